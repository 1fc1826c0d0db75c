"""SmolLM3 models."""

from typing import Any

from dpo_engine.errors import shorten
from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, biases, dense, sliding


@FAMILIES.register("smollm3")
class SmolLM3:
    """Llama's layers; some have no rotary positions, and some may have a sliding window."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a SmolLM3 ``config.json``. In ``no_rope_layers``, 1 means that a layer has rotary positions."""
        count = config.count("num_hidden_layers")
        interval = config.count("no_rope_layer_interval", 4)
        rotated = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(count)]
        if not isinstance(rotated, list) or len(rotated) != count or any(flag not in (0, 1) for flag in rotated):
            config.problem(
                f"no_rope_layers={shorten(repr(rotated), 60)}: must have {count} entries, each 0 or 1; correct "
                "config.json"
            )
            rotated = []
        layers = tuple(layer for layer, flag in enumerate(rotated) if not flag)
        facts: dict[str, Any] = {"nope_layers": layers}
        if config.flag("use_sliding_window", False) and config.get("sliding_window") is not None:
            near = layers if config.get("layer_types") is None else sliding(config)
            facts |= {"sliding_window": config.count("sliding_window"), "sliding_layers": near or None}
        return dense(config, num_kv_heads=4, theta=2e6, tied=True, **facts, **biases(config, mlp=False))
