"""Granite 3 dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, biases, dense


@FAMILIES.register("granite")
class Granite:
    """Llama's layers, with scale factors for embeddings, attention scores, residuals and logits."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Granite ``config.json``; ``attention_multiplier`` replaces 1 / sqrt(head_dim)."""
        return dense(
            config,
            **biases(config, mlp=False),
            attention_scale=config.number("attention_multiplier", 1.0),
            embedding_scale=config.number("embedding_multiplier", 1.0),
            residual_scale=config.number("residual_multiplier", 1.0),
            logit_scale=1.0 / config.number("logits_scaling", 1.0),
        )
