"""Qwen3 mixtures of experts, such as Qwen3-30B-A3B."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, QK_NORM, ROOT, dense
from dpo_engine.model.families.mixtures import DENSE_MLP, checked, fused_experts, mixture, named_count, sparse_layers
from dpo_engine.model.families.qwen2 import qwen_window
from dpo_engine.model.mixture import Experts


@FAMILIES.register("qwen3_moe")
class Qwen3Moe:
    """Qwen3's layers, with experts instead of the MLP in some layers or in all."""

    rules = ROOT + NORMS + ATTENTION + QK_NORM + DENSE_MLP + mixture()
    fused = fused_experts()

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Qwen3-MoE ``config.json``."""
        config.only("attention_bias", False, "a bias in the attention's output projection is not supported")
        experts = Experts(
            layers=sparse_layers(config),
            count=named_count(config, "num_experts", "num_local_experts", default=128),
            chosen=config.count("num_experts_per_tok", 8),
            ffn_hidden_size=config.count("moe_intermediate_size", 768),
            normalized=config.flag("norm_topk_prob", False),
        )
        window = {**qwen_window(config), "sliding_layers": ()}  # all layers have the window, if there is one
        return dense(config, qk_norm=True, num_kv_heads=4, experts=checked(config, experts), **window)
