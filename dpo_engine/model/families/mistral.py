"""Mistral 7B, Nemo and other dense Mistral models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("mistral")
class Mistral:
    """Dense decoder without biases; older ones attend through a sliding window."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Facts of a Mistral ``config.json``; a window that is left out is not the same as one that is null."""
        values = config.values
        window = None if values.get("sliding_window", 0) is None else config.count("sliding_window", 4096)
        return dense(config, num_kv_heads=8, sliding_window=window)
