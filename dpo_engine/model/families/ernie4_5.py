"""ERNIE 4.5 dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("ernie4_5")
class Ernie:
    """Llama's layers; adjacent dimensions are rotated together."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read an ERNIE 4.5 ``config.json``."""
        bias = config.flag("use_bias", False)
        return dense(
            config,
            head_dim=128,
            num_kv_heads=2,
            eps=("rms_norm_eps", 1e-5),
            tied=True,
            theta=500000.0,
            rotary_interleaved=True,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
        )
