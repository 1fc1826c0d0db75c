"""Qwen3 dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, QK_NORM, dense
from dpo_engine.model.families.qwen2 import qwen_window


@FAMILIES.register("qwen3")
class Qwen3:
    """Dense decoder with per-head norms on queries and keys, and a head size independent of the hidden size."""

    rules = DENSE + QK_NORM

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Qwen3 ``config.json``."""
        config.only("attention_bias", False, "a bias in the attention's output projection is not supported")
        return dense(config, qk_norm=True, head_dim=128, num_kv_heads=32, **qwen_window(config))
