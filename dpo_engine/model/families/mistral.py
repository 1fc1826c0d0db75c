"""Mistral 7B, Nemo, Ministral 8B (2410) and other dense Mistral models."""

from dataclasses import replace

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense, sliding


@FAMILIES.register("mistral", "ministral")
class Mistral:
    """Dense decoder without biases; older models have a sliding window."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Mistral ``config.json``.

        If the field ``sliding_window`` is null, there is no window. If it is absent, the window is 4096, as in
        transformers. If ``model_type`` is ``ministral``, ``layer_types`` can limit the window to some layers.
        Otherwise, all layers have the window.
        """
        values = config.values
        window = None if values.get("sliding_window", 0) is None else config.count("sliding_window", 4096)
        arch = dense(config, num_kv_heads=8, sliding_window=window)
        if window is not None and config.get("model_type") == "ministral":
            layers = sliding(config)
            if len(layers) < arch.num_layers:
                return replace(arch, sliding_window=window if layers else None, sliding_layers=layers)
        return arch
