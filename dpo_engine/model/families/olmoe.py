"""OLMoE models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, WHOLE_QK_NORM, dense
from dpo_engine.model.families.mixtures import checked, fused_experts, mixture, named_count
from dpo_engine.model.mixture import Experts


@FAMILIES.register("olmoe")
class Olmoe:
    """Llama's layers, with experts in every layer, and norms of the queries and keys of all heads together."""

    rules = ROOT + NORMS + ATTENTION + WHOLE_QK_NORM + mixture()
    fused = fused_experts()

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read an OLMoE ``config.json``."""
        config.only("attention_bias", False, "biases in attention are not supported for OLMo models")
        config.only("clip_qkv", None, "clipped queries, keys and values are not supported")
        experts = Experts(
            layers=tuple(range(config.count("num_hidden_layers"))),
            count=named_count(config, "num_experts", "num_local_experts", default=64),
            chosen=config.count("num_experts_per_tok", 8),
            ffn_hidden_size=config.count("intermediate_size"),
            normalized=config.flag("norm_topk_prob", False),
        )
        return dense(config, eps=("rms_norm_eps", 1e-5), whole_qk_norm=True, experts=checked(config, experts))
