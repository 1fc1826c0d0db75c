"""A plugin with a model family: a new ``model_type`` that has the layers and the weight names of Llama."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("lab_llama")
class LabLlama:
    """Llama under another name. Its ``config.json`` has the epsilon of the norms under the name ``norm_epsilon``."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Return the architecture described by a ``config.json`` of this family."""
        config.values["rms_norm_eps"] = config.number("norm_epsilon")
        return dense(config)
