"""DeepSeek-V3, DeepSeek-R1 and Moonlight models."""

from dataclasses import replace
from typing import Any

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import HF_LAYER, NORMS, ROOT, dense, linear, vector
from dpo_engine.model.families.mixtures import DENSE_MLP, checked, deepseek_experts, fused_experts, mixture
from dpo_engine.model.families.rope import mscale
from dpo_engine.model.families.rule import LAYER, Rule
from dpo_engine.model.mixture import Latent


def whole(parameter: str, tensor: str, rows: str, columns: str, when: str | None = None) -> Rule:
    """Return the rule for a matrix that is replicated on all tensor-parallel ranks."""
    stored = (f"{HF_LAYER}self_attn.{tensor}.weight",)
    return Rule(f"{LAYER}self_attention.{parameter}.weight", stored, (rows,), columns, when=when)


def query(parameter: str, tensor: str, columns: str, when: str) -> Rule:
    """Return the rule for the projection to queries."""
    (rule,) = linear(f"self_attention.{parameter}", {f"self_attn.{tensor}": "query_size"}, columns=columns, cut=0)
    return replace(rule, when=when)


LATENT_ATTENTION = (
    query("linear_q_proj", "q_proj", "hidden_size", "latent.has_no_query_rank"),
    whole("linear_q_down_proj", "q_a_proj", "latent.query_rank", "hidden_size", "latent.has_query_rank"),
    vector("self_attention.q_layernorm", "self_attn.q_a_layernorm", "latent.query_rank", when="latent.has_query_rank"),
    query("linear_q_up_proj", "q_b_proj", "latent.query_rank", "latent.has_query_rank"),
    whole("linear_kv_down_proj", "kv_a_proj_with_mqa", "latent.down_size", "hidden_size"),
    vector("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", "latent.rank"),
    *linear(
        "self_attention.linear_kv_up_proj", {"self_attn.kv_b_proj": "latent_kv_size"}, columns="latent.rank", cut=0
    ),
    *linear("self_attention.linear_proj", {"self_attn.o_proj": "hidden_size"}, columns="value_size", cut=1),
)

RULES = ROOT + NORMS + LATENT_ATTENTION + DENSE_MLP + mixture(shared="shared_experts")


def latent_facts(config: HFConfig, *, interleaved: bool) -> dict[str, Any]:
    """Read the fields of latent attention; return fields of ``Architecture``."""
    config.only("attention_bias", False, "biases in attention are not supported for DeepSeek models")
    query_rank = config.values.get("q_lora_rank", 1536)
    inside = Latent(
        query_rank=None if query_rank is None else config.count("q_lora_rank", 1536),
        rank=config.count("kv_lora_rank", 512),
        plain=config.count("qk_nope_head_dim", 128),
        rotary=config.count("qk_rope_head_dim", 64),
        value=config.count("v_head_dim", 128),
    )
    width = inside.plain + inside.rotary
    config.values["head_dim"] = inside.rotary  # in transformers, this field is the number of rotated dimensions
    factor = mscale(config)
    scale = None if factor == 1.0 else width**-0.5 * factor * factor
    return {"latent": inside, "rotary_interleaved": interleaved, "attention_scale": scale}


def with_heads(arch: Architecture) -> Architecture:
    """Return ``arch`` with latent attention's head size, number of rotated dimensions, and number of key heads."""
    inside = arch.latent
    return replace(
        arch,
        head_dim=inside.plain + inside.rotary,
        rotary_dim=inside.rotary,
        num_kv_heads=arch.num_attention_heads,  # each head has its own keys and values
    )


@FAMILIES.register("deepseek_v3")
class DeepseekV3:
    """Latent attention; all but the first layers have experts, which are chosen by sigmoid score plus bias."""

    rules = RULES
    fused = fused_experts()

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a DeepSeek-V3 ``config.json``."""
        facts = latent_facts(config, interleaved=config.flag("rope_interleave", True))
        experts = deepseek_experts(config, count=256, chosen=8, width=2048, dense_layers=3, groups=(8, 4), scale=2.5)
        return with_heads(dense(config, experts=checked(config, experts), **facts))
