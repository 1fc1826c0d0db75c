"""Qwen2 and Qwen2.5 dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


def qwen_window(config: HFConfig) -> int | None:
    """Return the sliding window in tokens if ``use_sliding_window`` enables it for some layers, else None."""
    return config.count("sliding_window", 4096) if config.flag("use_sliding_window", False) else None


@FAMILIES.register("qwen2")
class Qwen2:
    """Dense decoder with biases in the query, key and value projections."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Qwen2 ``config.json``."""
        return dense(config, qkv_bias=True, num_kv_heads=32, sliding_window=qwen_window(config))
