"""Llama 1 to 3.x, and the many models that share Llama's ``config.json``."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("llama")
class Llama:
    """Dense decoder without biases."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Llama ``config.json``."""
        config.only("attention_bias", False, "a bias in the attention's output projection is not supported")
        config.only("mlp_bias", False, "biases in the MLP are not supported")
        return dense(config)
