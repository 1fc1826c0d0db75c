"""Seed-OSS models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("seed_oss")
class SeedOss:
    """Llama's layers; separate fields turn on biases of attention's input and output projections, and of the MLP."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Seed-OSS ``config.json``. Dropout fields are not read, because training uses no dropout."""
        return dense(
            config,
            head_dim=128,
            num_kv_heads=8,
            qkv_bias=config.flag("attention_bias", True),
            out_bias=config.flag("attention_out_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
        )
