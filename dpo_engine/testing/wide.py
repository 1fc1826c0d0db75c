"""Run the models of transformers in fp64, to compute expected values for tests."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def wide():
    """Make transformers compute in one thread, and in fp64 where its code requests fp32 (in norms and in softmax).

    With a tiny model, several threads would spend more time waiting for each other than computing.
    """
    from dpo_engine.platform import host_operations

    threads = torch.get_num_threads()
    real = torch.float32, torch.float, torch.Tensor.float, host_operations.SMALL_PRODUCT
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    host_operations.SMALL_PRODUCT = 1 << 60  # do not use the engine's own matmul, which computes in fp32
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.float32, torch.float, torch.Tensor.float, host_operations.SMALL_PRODUCT = real


def angles_of(module: torch.nn.Module, positions: torch.Tensor) -> dict[str | None, Any]:
    """Return the cosines and sines of a rotary module, by kind of layer.

    If all kinds of layers have the same angles, the only key is None. For DeepSeek-V2, the values are complex numbers
    instead of cosines and sines.
    """
    kinds = [kind for kind in ("full_attention", "sliding_attention") if hasattr(module, f"{kind}_inv_freq")] or [None]
    asked = [(torch.zeros(1), positions, *([] if kind is None else [kind])) for kind in kinds]
    found = {kind: module(*given) for kind, given in zip(kinds, asked, strict=True)}
    if isinstance(found.get(None), torch.Tensor):
        # Use torch.cos and torch.sin, as the engine does. In fp32, they round differently from torch.polar, which
        # transformers uses.
        angles = positions[..., None].float() * module.inv_freq
        parts = (part.double() * module.attention_scaling for part in (angles.cos(), angles.sin()))
        return {None: torch.complex(*parts)}
    return {kind: [part.double() for part in parts] for kind, parts in found.items()}


def _known_angles(parts, x, position_ids, layer_type=None):
    known, length = parts[layer_type], position_ids.shape[1]
    return known[:, :length] if isinstance(known, torch.Tensor) else [part[:, :length] for part in known]


def wide_model(directory: Path, length: int, prepare=lambda model: None) -> torch.nn.Module:
    """Load a model with transformers in fp64. Its rotary angles have fp32 values, as in the engine.

    Run the model inside :func:`wide`.

    length   maximum length of an input row, in tokens
    prepare  function that is called with the loaded model
    """
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    angles = {
        name: angles_of(module, torch.arange(length)[None])
        for name, module in plain.named_modules()
        if name.endswith("rotary_emb")
    }
    with wide():
        model = type(plain)(plain.config).double().eval()
        model.load_state_dict(plain.state_dict())
    for name, parts in angles.items():
        model.get_submodule(name).forward = partial(_known_angles, parts)
    prepare(model)
    return model


def expected_logits(directory: Path, tokens: torch.Tensor, prepare=lambda model: None) -> torch.Tensor:
    """Return the logits of transformers' model in fp64; ``prepare`` is called with the model before it runs."""
    model = wide_model(directory, tokens.shape[1], prepare)
    with wide(), torch.no_grad():
        return model(tokens).logits
