"""HunYuan dense models."""

from dataclasses import replace

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, biases, dense, qk_norm


@FAMILIES.register("hunyuan_v1_dense")
class HunYuan:
    """Llama's layers, with norms of each head's queries and keys after the rotation."""

    rules = DENSE + qk_norm("query_layernorm", "key_layernorm")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a HunYuan ``config.json``. The parameter ``alpha`` of the rotary positions only changes their base."""
        arch = dense(config, eps=("rms_norm_eps", 1e-5), qk_norm=True, norm_after_rope=True, **biases(config))
        scaling = config.get("rope_scaling") or config.get("rope_parameters")
        given = scaling if isinstance(scaling, dict) else {}
        if given.get("rope_type", given.get("type")) != "dynamic" or not given.get("alpha"):
            return arch
        inner = HFConfig(given, config.where)
        alpha, width = inner.number("alpha"), arch.head_dim
        config.problems += inner.problems
        return replace(arch, rope_theta=arch.rope_theta * alpha ** (width / max(width - 2, 1)))
