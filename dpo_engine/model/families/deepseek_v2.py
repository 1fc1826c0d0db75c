"""DeepSeek-V2 and DeepSeek-V2.5 models."""

from dataclasses import replace

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import dense
from dpo_engine.model.families.deepseek_v3 import RULES, latent_facts, with_heads
from dpo_engine.model.families.mixtures import checked, deepseek_experts, fused_experts


@FAMILIES.register("deepseek_v2")
class DeepseekV2:
    """Latent attention; the chosen experts have the highest scores of all experts, or of the best groups of experts."""

    rules = RULES
    fused = fused_experts()

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a DeepSeek-V2 ``config.json``. As in transformers, ``norm_topk_prob`` is not read."""
        config.only("mlp_bias", False, "biases in the MLP are not supported for DeepSeek models")
        facts = latent_facts(config, interleaved=True)
        limited = config.get("topk_method", "greedy") == "group_limited_greedy"
        if not limited:
            config.values.pop("n_group", None)
            config.values.pop("topk_group", None)
        config.values.pop("norm_topk_prob", None)
        found = deepseek_experts(config, count=64, chosen=None, width=1407, shared=2, dense_layers=0, groups=(1, 1))
        experts = replace(found, score="softmax", normalized=False, bias=False, group_best=1)
        return with_heads(dense(config, experts=checked(config, experts), **facts))
