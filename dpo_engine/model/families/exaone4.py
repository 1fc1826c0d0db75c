"""EXAONE 4 models."""

from typing import Any

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import AFTER_NORMS, ATTENTION, MLP, QK_NORM, ROOT, dense, sliding


@FAMILIES.register("exaone4")
class Exaone4:
    """Norms after attention and MLP, and norms of each head's queries and keys.

    If the field ``sliding_window`` is null, all layers have rotary positions. Otherwise, only the layers with a sliding
    window have rotary positions.
    """

    rules = ROOT + AFTER_NORMS + ATTENTION + QK_NORM + MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read an EXAONE 4 ``config.json``."""
        facts: dict[str, Any] = {}
        if config.values.get("sliding_window", 4096) is not None:
            pattern = config.get("sliding_window_pattern", 4)
            period = len(pattern) if isinstance(pattern, str) else config.count("sliding_window_pattern", 4)
            windowed = sliding(config, period)
            full = tuple(layer for layer in range(config.count("num_hidden_layers")) if layer not in windowed)
            facts = {"sliding_window": config.count("sliding_window", 4096), "nope_layers": full}
        return dense(config, num_kv_heads=32, eps=("rms_norm_eps", 1e-5), qk_norm=True, norm_place="after", **facts)
