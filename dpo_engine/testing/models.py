"""Make tiny random models with transformers."""

import copy
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields of ``config.json`` of every tiny model. A case can override them."""


class TinyModels:
    """Create each model of a table of cases once, and cache the results that the checks compute from the models.

    folder   existing directory, to which models and exports are written
    cases    for each case, the ``model_type``, and the fields of ``config.json`` in addition to `TINY`

    If transformers does not have the ``model_type``, the caller must register it with transformers' auto classes.
    """

    def __init__(self, folder: Path, cases: Mapping[str, tuple[str, Mapping[str, Any]]]):
        self.folder, self.cases = Path(folder), cases
        self._made: dict[str, Path] = {}
        self._known: dict[Any, Any] = {}

    def make(
        self, family: str = "llama", *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config: Any
    ) -> Path:
        """Return the directory of a random model of a family; the same arguments give the same directory.

        config   fields of ``config.json`` in addition to `TINY`

        The values of the matrices are multiplied by 3, and all vectors, such as biases, differ from their initial
        values, so that every mistake clearly changes the logits.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        key = repr((family, str(dtype), max_shard_size, sorted(config.items(), key=str)))
        if key not in self._made:
            torch.manual_seed(zlib.crc32(key.encode()))  # a counter as the seed would depend on the order of tests
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **config}))
            for name, parameter in model.named_parameters():
                # the biases of all experts of a layer form a matrix, but start as zeros, so they are treated as vectors
                is_matrix = parameter.dim() > 1 and not name.endswith("bias")
                parameter.data.mul_(3.0) if is_matrix else parameter.data.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # zeros would not change which experts are chosen
                    buffer.copy_(0.1 * torch.randn_like(buffer))
            directory = self.folder / f"{family}-{len(self._made)}"
            model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
            self._made[key] = directory
        return self._made[key]

    def of(self, case: str) -> Path:
        """Return the directory of a case's model."""
        family, options = self.cases[case]
        return self.make(family, pad_token_id=0, **copy.deepcopy(dict(options)))  # transformers changes nested values

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Call ``compute`` at the first request for this ``key``; return its result at every request."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]
