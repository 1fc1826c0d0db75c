"""Mistral 7B, Nemo, Ministral 8B (2410) and other dense Mistral models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("mistral", "ministral")
class Mistral:
    """Dense decoder without biases; older models use sliding-window attention."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Mistral ``config.json``.

        If the field ``sliding_window`` is null, there is no window. If it is absent, the window is 4096, as in
        transformers.
        """
        values = config.values
        window = None if values.get("sliding_window", 0) is None else config.count("sliding_window", 4096)
        return dense(config, num_kv_heads=8, sliding_window=window)
