"""Norms of hidden states, with Megatron's constructor arguments. Plugins can register others in `NORMS`.

Megatron's own torch norm does not support sequence parallelism. With sequence parallelism, each rank normalizes only
its share of the tokens, so the gradients of a norm's parameters must be summed over the tensor-parallel group. Megatron
does this for parameters with the attribute ``sequence_parallel``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture
from dpo_engine.registry import Registry
from dpo_kernels import rms_norm

NORMS = Registry("norm")
"""Classes of norms, by the names in the field ``norm`` of :class:`~dpo_engine.model.architecture.Architecture`.

A class is called with Megatron's configuration, the size of the normalized axis, and ``eps``; the configuration's field
``arch`` is the architecture. A class must create its parameters with :func:`norm_parameter`, and the model family's
weight table must have rules for these parameters."""


def norm_parameter(config: Any, size: int, value: float) -> nn.Parameter:
    """Return a replicated vector of equal values. With sequence parallelism, Megatron sums its gradient over tp."""
    parameter = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=torch.cuda.current_device()))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


@NORMS.register("rms")
class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis. The architecture's ``norm_offset`` is added to the weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps, self.offset = eps, config.arch.norm_offset
        self.weight = norm_parameter(config, hidden_size, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., h]. The result has the same shape and dtype."""
        if self.offset or x.device.type == "cpu":  # torch's norm has no offset, and is slower on a CPU
            return rms_norm(x, self.weight, self.eps, self.offset)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@NORMS.register("layer")
class LayerNorm(nn.Module):
    """Layer norm over the last axis, with or without a bias. Unlike :class:`RMSNorm`, it subtracts the mean."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps, self.offset = eps, config.arch.norm_offset
        self.weight = norm_parameter(config, hidden_size, 1.0 - self.offset)
        self.bias = norm_parameter(config, hidden_size, 0.0) if config.arch.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., h]. The result has the same shape and dtype."""
        weight = self.weight + self.offset if self.offset else self.weight
        return F.layer_norm(x, (x.shape[-1],), weight, self.bias, self.eps)


def norm_of(arch: Architecture) -> type[nn.Module]:
    """Return the class of the norms of hidden states."""
    return NORMS[arch.norm]
