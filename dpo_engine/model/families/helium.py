"""Helium models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("helium")
class Helium:
    """Llama's layers; adjacent dimensions are rotated together."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Helium ``config.json``."""
        return dense(
            config,
            head_dim=128,
            num_kv_heads=20,
            eps=("rms_norm_eps", 1e-8),
            theta=100000.0,
            rotary_interleaved=True,
            qkv_bias=config.flag("attention_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
        )
