"""OLMo 3 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import dense, sliding
from dpo_engine.model.families.olmo2 import Olmo2
from dpo_engine.model.families.rope import ropes


@FAMILIES.register("olmo3")
class Olmo3:
    """OLMo 2's layers; by default, all layers except every fourth one have a sliding window.

    The field ``rope_scaling`` applies only to the layers without a window.
    """

    rules = Olmo2.rules

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read an OLMo 3 ``config.json``."""
        config.only("attention_bias", False, "biases in attention are not supported for OLMo models")
        return dense(
            config,
            eps=("rms_norm_eps", 1e-5),
            norm_place="after",
            whole_qk_norm=True,
            sliding_window=config.count("sliding_window", 4096),
            sliding_layers=sliding(config, 4) or None,
            **ropes(config, theta=500000.0, sliding=(None, 500000.0)),
        )
