"""Gemma 2 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ALL_NORMS, ATTENTION, MLP, ROOT, activation, dense, sliding, softcap


@FAMILIES.register("gemma2")
class Gemma2:
    """Gemma's layers, with soft caps, a window in every other layer, and additional norms after attention and MLP."""

    rules = ROOT + ALL_NORMS + ATTENTION + MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Gemma 2 ``config.json``."""
        config.only("use_bidirectional_attention", None, "attention to later tokens is not supported")
        config.only("attention_bias", False, "biases in attention are not supported for Gemma models")
        return dense(
            config,
            head_dim=256,
            num_kv_heads=4,
            tied=True,
            norm_offset=1.0,
            norm_place="both",
            activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
            attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
            attention_softcap=softcap(config, "attn_logit_softcapping", 50.0),
            logit_softcap=softcap(config, "final_logit_softcapping", 30.0),
            embedding_scale=config.count("hidden_size") ** 0.5,
            sliding_window=config.count("sliding_window", 4096),
            sliding_layers=sliding(config, 2) or None,
        )
