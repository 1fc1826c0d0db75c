"""Qwen1.5 and Qwen2 mixtures of experts."""

from typing import Any

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, dense
from dpo_engine.model.families.mixtures import DENSE_MLP, checked, fused_experts, mixture, named_count, sparse_layers
from dpo_engine.model.families.qwen2 import qwen_window
from dpo_engine.model.mixture import Experts


@FAMILIES.register("qwen2_moe")
class Qwen2Moe:
    """Qwen2's layers, with experts and with a gated shared expert."""

    rules = ROOT + NORMS + ATTENTION + DENSE_MLP + mixture(shared="shared_expert")
    fused = fused_experts()

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Qwen2-MoE ``config.json``."""
        experts = Experts(
            layers=sparse_layers(config),
            count=named_count(config, "num_experts", "num_local_experts", default=60),
            chosen=config.count("num_experts_per_tok", 4),
            ffn_hidden_size=config.count("moe_intermediate_size", 1408),
            normalized=config.flag("norm_topk_prob", False),
            shared_size=config.count("shared_expert_intermediate_size", 5632),
            shared_gate=True,
        )
        bias, mixed = config.flag("qkv_bias", True), checked(config, experts)
        return dense(config, num_kv_heads=16, qkv_bias=bias, experts=mixed, **_windows(config))


def _windows(config: HFConfig) -> dict[str, Any]:
    """Read the sliding window. Without ``layer_types``, the even layers below ``max_window_layers`` have it."""
    found = qwen_window(config)
    if found and config.get("layer_types") is None:
        end = min(config.get("max_window_layers", 28), config.count("num_hidden_layers"))
        found["sliding_layers"] = tuple(range(0, end, 2)) or None
    return found
