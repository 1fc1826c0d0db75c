"""GLM-4-0414 dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, FUSED_MLP, ROOT, dense, norm


@FAMILIES.register("glm4")
class Glm4:
    """Norms before and after attention and MLP; in half of each head, adjacent dimensions are rotated together."""

    rules = (
        ROOT
        + norm("input_layernorm", "input_layernorm")
        + norm("post_attention_layernorm", "post_self_attn_layernorm")
        + norm("pre_mlp_layernorm", "post_attention_layernorm")
        + norm("post_mlp_layernorm", "post_mlp_layernorm")
        + ATTENTION
        + FUSED_MLP
    )

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a GLM-4 ``config.json``."""
        return dense(
            config,
            head_dim=128,
            num_kv_heads=2,
            eps=("rms_norm_eps", 1.5625e-07),
            partial=0.5,
            rotary_interleaved=True,
            norm_place="both",
            qkv_bias=config.flag("attention_bias", True),
        )
