"""GPT-NeoX models, such as Pythia."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import activation, dense, linear, norm, plain_mlp, root

LAYER = "gpt_neox.layers.{l}."


@FAMILIES.register("gpt_neox")
class GptNeoX:
    """Layer norms, an MLP with biases and without a gate, and rotary positions for a part of each head.

    By default, a quarter of each head is rotated, and attention also has biases. Attention and the MLP run in parallel,
    or the MLP follows attention. If they run in parallel, both read the same hidden states, each through its own norm.
    The rows for queries, keys and values are stored head by head, as in Megatron.
    """

    rules = (
        root("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
        + norm("input_layernorm", "input_layernorm", inside=LAYER)
        + norm("pre_mlp_layernorm", "post_attention_layernorm", inside=LAYER)
        + linear(
            "self_attention.linear_qkv",
            {"attention.query_key_value": "qkv_size"},
            columns="hidden_size",
            cut=0,
            bias="qkv_bias",
            inside=LAYER,
        )
        + linear(
            "self_attention.linear_proj",
            {"attention.dense": "hidden_size"},
            columns="query_size",
            cut=1,
            bias="out_bias",
            inside=LAYER,
        )
        + plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", inside=LAYER)
    )

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a GPT-NeoX ``config.json``, with the old names of the rotary fields or the new ones."""
        config.values.setdefault("rope_theta", config.get("rotary_emb_base", 10000.0))
        bias = config.flag("attention_bias", True)
        return dense(
            config,
            eps=("layer_norm_eps", 1e-5),
            partial=config.number("rotary_pct", 0.25),
            norm="layer",
            norm_bias=True,
            parallel="two norms" if config.flag("use_parallel_residual", True) else None,
            activation=activation(config, default="gelu"),
            gated=False,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=True,
        )
