"""Norms over hidden states and heads, with Megatron's constructor arguments.

Megatron's own torch norm does not support sequence parallelism, in which each rank normalizes only its share of the
tokens. The gradient of a weight must then be summed over the tensor-parallel group. Megatron does this for parameters
with the attribute ``sequence_parallel``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_engine.platform.host_operations import rms_norm


def _vector(config: Any, size: int, value: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=torch.cuda.current_device()))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps = eps
        self.weight = _vector(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., h]. The result has the same shape and dtype."""
        if x.device.type == "cpu":
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
