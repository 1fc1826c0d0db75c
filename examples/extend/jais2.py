"""A plugin with a model family and an activation: Jais 2. All its layer norms and linear layers have biases."""

import torch

from dpo_engine import ACTIVATIONS, FAMILIES
from dpo_engine.model.architecture import Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, activation, biases, dense, plain_mlp


@ACTIVATIONS.register("relu")
def relu(x):
    """Return the positive part of x. By default, Jais 2 squares it, but ``config.json`` can select ``relu``."""
    return torch.relu(x)


@FAMILIES.register("jais2")
class Jais2:
    """Llama's names, layer norms with biases, and an MLP without a gate."""

    rules = ROOT + NORMS + ATTENTION + plain_mlp("mlp.up_proj", "mlp.down_proj")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Return the architecture described by a ``config.json`` of this family."""
        return dense(
            config,
            eps=("layer_norm_eps", 1e-5),
            norm="layer",
            norm_bias=True,
            gated=False,
            activation=activation(config, default="relu2"),
            **biases(config, attention=True, mlp=True),
        )
