"""Mixtral models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, dense
from dpo_engine.model.families.mixtures import checked, fused_experts, mixture, named_count
from dpo_engine.model.mixture import Experts


@FAMILIES.register("mixtral")
class Mixtral:
    """Mistral's layers, with experts in every layer."""

    rules = ROOT + NORMS + ATTENTION + mixture("block_sparse_moe.", names=("w1", "w3", "w2"))
    fused = fused_experts("block_sparse_moe.", ("w1", "w3", "w2"))

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Mixtral ``config.json``."""
        config.only("router_jitter_noise", 0.0, "noise in the router's input is not supported; set it to 0")
        experts = Experts(
            layers=tuple(range(config.count("num_hidden_layers"))),
            count=named_count(config, "num_local_experts", "num_experts", default=8),
            chosen=config.count("num_experts_per_tok", 2),
            ffn_hidden_size=config.count("intermediate_size"),
        )
        return dense(
            config,
            num_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            theta=1e6,
            sliding_window=None if config.get("sliding_window") is None else config.count("sliding_window"),
            experts=checked(config, experts),
        )
