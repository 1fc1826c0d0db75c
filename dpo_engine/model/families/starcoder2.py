"""StarCoder2 models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, activation, dense, plain_mlp


@FAMILIES.register("starcoder2")
class Starcoder2:
    """Layer norms, an MLP without a gate, and by default biases in attention and in the MLP."""

    rules = ROOT + NORMS + ATTENTION + plain_mlp("mlp.c_fc", "mlp.c_proj")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a StarCoder2 ``config.json``."""
        bias = config.flag("use_bias", True)
        return dense(
            config,
            num_kv_heads=2,
            eps=("norm_epsilon", 1e-5),
            tied=True,
            sliding_window=None if config.get("sliding_window") is None else config.count("sliding_window"),
            norm="layer",
            norm_bias=True,
            activation=activation(config, default="gelu_pytorch_tanh"),
            gated=False,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
        )
