"""HunYuan dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, biases, dense, qk_norm


@FAMILIES.register("hunyuan_v1_dense")
class HunYuan:
    """Llama's layers, with norms of each head's queries and keys after they are rotated."""

    rules = DENSE + qk_norm("query_layernorm", "key_layernorm")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a HunYuan ``config.json``."""
        return dense(config, eps=("rms_norm_eps", 1e-5), qk_norm=True, norm_after_rope=True, **biases(config))
