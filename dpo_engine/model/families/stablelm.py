"""StableLM 2 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, MLP, ROOT, dense, norm


@FAMILIES.register("stablelm")
class StableLm:
    """Layer norms, and by default rotary positions for a quarter of each head.

    The MLP follows attention, or both read the output of one norm, in parallel.
    """

    rules = (
        ROOT
        + norm("input_layernorm", "input_layernorm")
        + norm("pre_mlp_layernorm", "post_attention_layernorm", when="mlp_norm")
        + ATTENTION
        + MLP
    )

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a StableLM ``config.json``."""
        config.only("qk_layernorm", False, "norms with a separate weight for each head are not supported")
        return dense(
            config,
            num_kv_heads=32,
            eps=("layer_norm_eps", 1e-5),
            partial=0.25,
            norm="layer",
            norm_bias=True,
            parallel="one norm" if config.flag("use_parallel_residual", False) else None,
            qkv_bias=config.flag("use_qkv_bias", False),
        )
