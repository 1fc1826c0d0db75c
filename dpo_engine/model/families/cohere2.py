"""Command R7B and Command A models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import biases, dense, sliding
from dpo_engine.model.families.cohere import Cohere


@FAMILIES.register("cohere2")
class Cohere2:
    """Command R's layers; only those with a sliding window have rotary positions."""

    rules = Cohere.rules

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Command R7B ``config.json``."""
        windowed = sliding(config, config.count("sliding_window_pattern", 4))
        config.values.pop("head_dim", None)  # transformers does not read this field
        return dense(
            config,
            eps=("layer_norm_eps", 1e-5),
            tied=True,
            sliding_window=config.count("sliding_window", 4096),
            nope_layers=tuple(layer for layer in range(config.count("num_hidden_layers")) if layer not in windowed),
            norm="layer",
            parallel="one norm",
            rotary_interleaved=True,
            logit_scale=config.number("logit_scale", 0.0625),
            **biases(config),
        )
