"""Seed-OSS models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense


@FAMILIES.register("seed_oss")
class SeedOss:
    """Llama's layers, with a head size of their own and biases that are chosen one by one."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Seed-OSS ``config.json``. Dropout is not read, because training has none."""
        return dense(
            config,
            head_dim=128,
            num_kv_heads=8,
            qkv_bias=config.flag("attention_bias", True),
            out_bias=config.flag("attention_out_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
        )
