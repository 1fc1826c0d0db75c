"""Gemma 1 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, activation, dense


@FAMILIES.register("gemma")
class Gemma:
    """Norms multiply by 1 plus the stored weight, embeddings are scaled, and the gate uses an approximation of GELU."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Gemma ``config.json``. Older files name GELU, but the model uses its approximation."""
        config.only("use_bidirectional_attention", None, "attention to later tokens is not supported")
        config.only("attention_bias", False, "biases in attention are not supported for Gemma models")
        if config.get("hidden_act") == "gelu":
            config.values["hidden_act"] = "gelu_pytorch_tanh"
        return dense(
            config,
            head_dim=256,
            num_kv_heads=16,
            tied=True,
            norm_offset=1.0,
            activation=activation(config, default="gelu_pytorch_tanh"),
            embedding_scale=config.count("hidden_size") ** 0.5,
        )
