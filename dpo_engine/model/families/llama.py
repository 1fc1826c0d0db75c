"""Llama 1 to 3.x, and the many models that use ``model_type: llama``."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, biases, dense


@FAMILIES.register("llama")
class Llama:
    """Dense decoder; attention may have biases, and so may the MLP."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Llama ``config.json``."""
        return dense(config, **biases(config, mlp=False))
