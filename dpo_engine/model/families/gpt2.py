"""GPT-2 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import activation, dense, linear, norm, root
from dpo_engine.model.families.rule import Rule

LAYER = "transformer.h.{l}."
OPTIONS = {"bias": "mlp_bias", "inside": LAYER, "transposed": True}


@FAMILIES.register("gpt2")
class Gpt2:
    """Learned positions, layer norms, biases everywhere, no gate in the MLP, and linear weights stored transposed."""

    rules = (
        *root("transformer.wte", "transformer.ln_f"),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",), ("max_positions",), "hidden_size"),
        *norm("input_layernorm", "ln_1", inside=LAYER),
        *norm("pre_mlp_layernorm", "ln_2", inside=LAYER),
        *linear(
            "self_attention.linear_qkv",
            ("attn.c_attn", ("query_size", "kv_size", "kv_size")),
            columns="hidden_size",
            layout="qkv",
            cut=0,
            **OPTIONS,
        ),
        *linear("self_attention.linear_proj", {"attn.c_proj": "hidden_size"}, columns="query_size", cut=1, **OPTIONS),
        *linear("mlp.linear_fc1", {"mlp.c_fc": "ffn_hidden_size"}, columns="hidden_size", cut=0, **OPTIONS),
        *linear("mlp.linear_fc2", {"mlp.c_proj": "hidden_size"}, columns="ffn_hidden_size", cut=1, **OPTIONS),
    )

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a GPT-2 ``config.json``."""
        config.only("scale_attn_weights", True, "attention scores without a scale are not supported")
        config.only("scale_attn_by_inverse_layer_idx", False, "scales that depend on the layer are not supported")
        config.only("add_cross_attention", False, "attention to another sequence is not supported")
        sizes = {
            "hidden_size": config.count("n_embd", 768),
            "num_hidden_layers": config.count("n_layer", 12),
            "num_attention_heads": config.count("n_head", 12),
            "max_position_embeddings": config.count("n_positions", 1024),
            "vocab_size": config.count("vocab_size", 50257),
        }
        sizes["intermediate_size"] = config.count("n_inner", 4 * sizes["hidden_size"])
        config.values |= sizes
        for name in ("head_dim", "num_key_value_heads"):
            config.values.pop(name, None)
        return dense(
            config,
            eps=("layer_norm_epsilon", 1e-5),
            tied=True,
            norm="layer",
            norm_bias=True,
            activation=activation(config, "activation_function", "gelu_new"),
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            learned_positions=True,
            rope_theta=1.0,
        )
