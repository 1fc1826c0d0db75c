"""Qwen2 and Qwen2.5 dense models."""

from typing import Any

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense, sliding


def qwen_window(config: HFConfig) -> dict[str, Any]:
    """Read the sliding window and its layers. Without a window, return no fields.

    If ``layer_types`` is absent, all layers except the first ``max_window_layers`` layers have the window.
    """
    if not config.flag("use_sliding_window", False) or config.values.get("sliding_window", 0) is None:
        return {}
    first = config.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        config.problem(f"max_window_layers={first!r}: must be a whole number; correct it in config.json")
        first = 0
    layers = sliding(config, first=first) or None
    return {"sliding_window": config.count("sliding_window", 4096), "sliding_layers": layers}


@FAMILIES.register("qwen2")
class Qwen2:
    """Dense decoder with biases in the query, key and value projections."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Qwen2 ``config.json``."""
        return dense(config, qkv_bias=True, num_kv_heads=32, **qwen_window(config))
