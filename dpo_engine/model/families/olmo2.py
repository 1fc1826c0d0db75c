"""OLMo 2 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import AFTER_NORMS, ATTENTION, MLP, ROOT, WHOLE_QK_NORM, dense


@FAMILIES.register("olmo2")
class Olmo2:
    """Norms after attention and MLP, and norms of the queries and keys of all heads together."""

    rules = ROOT + AFTER_NORMS + ATTENTION + WHOLE_QK_NORM + MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read an OLMo 2 ``config.json``."""
        config.only("attention_bias", False, "biases in attention are not supported for OLMo models")
        return dense(config, eps=("rms_norm_eps", 1e-5), norm_place="after", whole_qk_norm=True)
