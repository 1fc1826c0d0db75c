"""A plugin with its own model family: a new ``model_type`` with the layers and weight names of Llama."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("lab_llama")
class LabLlama:
    """Llama under another name; its ``config.json`` calls the norms' epsilon ``norm_epsilon``."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Return the architecture described by a ``config.json`` of this family."""
        config.values["rms_norm_eps"] = config.number("norm_epsilon")
        return dense(config)
