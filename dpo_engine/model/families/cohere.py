"""Command R models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, MLP, ROOT, biases, dense, norm


@FAMILIES.register("cohere")
class Cohere:
    """Attention and MLP share one layer norm, which has no bias; logits are scaled."""

    rules = ROOT + norm("input_layernorm", "input_layernorm") + ATTENTION + MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Command R ``config.json``."""
        config.only("use_qk_norm", False, "norms with a separate weight for each head are not supported")
        return dense(
            config,
            eps=("layer_norm_eps", 1e-5),
            tied=True,
            theta=500000.0,
            norm="layer",
            parallel="one norm",
            rotary_interleaved=True,
            logit_scale=config.number("logit_scale", 0.0625),
            **biases(config),
        )
