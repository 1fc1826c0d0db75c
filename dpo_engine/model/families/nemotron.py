"""Nemotron-4 and Minitron models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, activation, biases, dense, plain_mlp


@FAMILIES.register("nemotron")
class Nemotron:
    """Layer norms, an MLP with squared ReLU and without a gate, and rotary positions for half of each head.

    The norms multiply by 1 plus the stored weight.
    """

    rules = ROOT + NORMS + ATTENTION + plain_mlp("mlp.up_proj", "mlp.down_proj")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Nemotron ``config.json``."""
        return dense(
            config,
            eps=("norm_eps", 1e-5),
            partial=0.5,
            norm="layer",
            norm_bias=True,
            norm_offset=1.0,
            activation=activation(config, default="relu2"),
            gated=False,
            **biases(config, mlp=False),
        )
