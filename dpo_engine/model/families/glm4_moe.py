"""GLM-4.5 and GLM-4.6 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, QK_NORM, ROOT, dense
from dpo_engine.model.families.mixtures import DENSE_MLP, checked, deepseek_experts, fused_experts, mixture


@FAMILIES.register("glm4_moe")
class Glm4Moe:
    """Rotary positions on half of each head; experts, chosen as in DeepSeek-V3, in all but the first 1 to 3 layers."""

    rules = ROOT + NORMS + ATTENTION + QK_NORM + DENSE_MLP + mixture(shared="shared_experts")
    fused = fused_experts()

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a GLM-4-MoE ``config.json``."""
        experts = deepseek_experts(config, count=128, chosen=8, width=1408, dense_layers=1, groups=(1, 1))
        return dense(
            config,
            num_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            partial=0.5,
            qkv_bias=config.flag("attention_bias", False),
            qk_norm=config.flag("use_qk_norm", False),
            experts=checked(config, experts),
        )
