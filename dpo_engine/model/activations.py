"""Activations of MLPs. Plugins can register others."""

from functools import partial

import torch
import torch.nn.functional as F

from dpo_engine.registry import Registry

ACTIVATIONS = Registry("activation")
"""Activation functions, by the names that the field ``activation`` of an architecture can have.

With a gate, the MLP computes ``activation(gate) * up``."""

ACTIVATIONS["silu"] = F.silu
ACTIVATIONS["gelu"] = F.gelu
ACTIVATIONS["gelu_tanh"] = partial(F.gelu, approximate="tanh")


@ACTIVATIONS.register("relu2")
def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Return the square of the positive part of x."""
    return torch.relu(x).square()
