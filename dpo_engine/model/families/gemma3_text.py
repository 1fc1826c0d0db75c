"""Gemma 3 text models (270M and 1B)."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import (
    ALL_NORMS,
    ATTENTION,
    MLP,
    QK_NORM,
    ROOT,
    activation,
    dense,
    sliding,
    softcap,
)
from dpo_engine.model.families.rope import ropes


@FAMILIES.register("gemma3_text")
class Gemma3:
    """Gemma's layers, with norms after attention and MLP, norms of queries and keys, windows, and two rotary bases."""

    rules = ROOT + ALL_NORMS + ATTENTION + QK_NORM + MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Gemma 3 ``config.json`` of a text model."""
        config.only("use_bidirectional_attention", False, "attention to later tokens is not supported")
        config.only("attention_bias", False, "biases in attention are not supported for Gemma models")
        config.only("attn_logit_softcapping", None, "soft caps of attention are not supported for Gemma 3 models")
        return dense(
            config,
            head_dim=256,
            num_kv_heads=4,
            tied=True,
            qk_norm=True,
            norm_offset=1.0,
            norm_place="both",
            activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
            attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
            embedding_scale=config.count("hidden_size") ** 0.5,
            logit_softcap=softcap(config, "final_logit_softcapping"),
            sliding_window=config.count("sliding_window", 4096),
            sliding_layers=sliding(config, config.count("sliding_window_pattern", 6)) or None,
            **ropes(config, theta=1e6, sliding=("rope_local_base_freq", 1e4)),
        )
