"""Ministral 3 models."""

from dataclasses import replace

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense
from dpo_engine.model.families.rope import LENGTH

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    LENGTH: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
}
"""The rotary fields of a model whose ``config.json`` has neither ``rope_parameters`` nor ``rope_scaling``."""


@FAMILIES.register("ministral3")
class Ministral3:
    """Mistral's layers. Rows so long that the model would scale their queries are not supported."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Ministral 3 ``config.json``.

        The model scales queries at positions from ``original_max_position_embeddings`` on. The engine does not scale
        queries, so ``max_positions`` is at most ``original_max_position_embeddings``.
        """
        if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
            config.values["rope_parameters"] = YARN
        window = None if config.get("sliding_window") is None else config.count("sliding_window")
        arch = dense(config, num_kv_heads=8, head_dim=128, eps=("rms_norm_eps", 1e-5), sliding_window=window)
        original = (arch.rope_scaling or {}).get(LENGTH, arch.max_positions)
        return replace(arch, max_positions=min(arch.max_positions, int(original)))
