"""A fork's own model family: an architecture of its own ``model_type`` with the layers and weight names of Llama."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("lab_llama")
class LabLlama:
    """Llama under another name, in whose ``config.json`` the norms' epsilon is called ``norm_epsilon``."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Facts of a ``config.json`` of this family."""
        config.values["rms_norm_eps"] = config.number("norm_epsilon")
        return dense(config)
