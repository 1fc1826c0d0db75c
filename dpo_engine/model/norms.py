"""Norms over hidden states and heads, with Megatron's constructor arguments.

Megatron's own torch norm does not support sequence parallelism, in which each rank normalizes only its share of the
tokens. The gradient of a weight must then be summed over the tensor-parallel group. Megatron does this for parameters
with the attribute ``sequence_parallel``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture
from dpo_engine.platform.host_operations import rms_norm


def _vector(config: Any, size: int, value: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=torch.cuda.current_device()))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis. The architecture's ``norm_offset`` is added to the weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps, self.offset = eps, config.arch.norm_offset
        self.weight = _vector(config, hidden_size, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., h]. The result has the same shape and dtype."""
        weight = self.weight
        if self.offset:  # in at least fp32, because the sum would lose digits of the weight
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset
        if x.device.type == "cpu":
            return rms_norm(x, weight, self.eps)
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Norm over the last axis that also subtracts the mean, with or without a bias."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps, self.offset = eps, config.arch.norm_offset
        self.weight = _vector(config, hidden_size, 1.0 - self.offset)
        self.bias = _vector(config, hidden_size, 0.0) if config.arch.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., h]. The result has the same shape and dtype."""
        weight = self.weight + self.offset if self.offset else self.weight
        return F.layer_norm(x, (x.shape[-1],), weight, self.bias, self.eps)


class WholeNorm(nn.Module):
    """Root-mean-square norm of the queries of all heads together. Every tensor-parallel rank has the whole weight.

    A rank's gradient of the weight covers its own heads. Megatron sums the gradients of parameters whose names contain
    ``q_layernorm`` or ``k_layernorm`` over tp.
    """

    heads = "num_attention_heads"

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps, self.size = eps, getattr(config.arch, self.heads) * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.weight = _vector(config, self.size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [s, b, n/t, d]. The result has the same shape and dtype.

        *Collectives* over tp: a sum [s, b] in the forward pass, and one in the backward pass.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        # Each rank computes only a part of the gradient of this sum.
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        weight = self.weight.chunk(self.group.size())[self.group.rank()].view(x.shape[-2:])
        return (wide * (squares / self.size + self.eps).rsqrt() * weight).to(x.dtype)


class WholeKeyNorm(WholeNorm):
    """The same for keys."""

    heads = "num_kv_heads"


def norm_of(arch: Architecture) -> type[nn.Module]:
    """Return the class of the norms of hidden states."""
    return {"rms": RMSNorm, "layer": LayerNorm}[arch.norm]


def head_norms_of(arch: Architecture) -> tuple[type[nn.Module] | None, type[nn.Module] | None]:
    """Return the classes of the norms of queries and of keys; None if there are none."""
    if arch.whole_qk_norm:
        return WholeNorm, WholeKeyNorm
    return (norm_of(arch), norm_of(arch)) if arch.qk_norm else (None, None)
