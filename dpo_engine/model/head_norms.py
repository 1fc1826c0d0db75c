"""Norms of queries and keys: per head, or of all heads together."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from dpo_engine.model.architecture import Architecture
from dpo_engine.model.norms import RMSNorm, norm_of, norm_parameter


class HeadNorm(RMSNorm):
    """Root-mean-square norm of each head before the rotation. :func:`dpo_kernels.split_heads` computes this norm."""

    def forward(self) -> Tensor:
        """Return the weight. Calling the module runs Megatron's hook that waits until the weight is gathered."""
        return self.weight


class WholeNorm(nn.Module):
    """Root-mean-square norm of the queries of all heads together. Every tensor-parallel rank has the whole weight.

    A rank's gradient of the weight is 0 for the heads of other ranks. Megatron sums the gradient over tp, because the
    parameter's name contains ``q_layernorm`` or ``k_layernorm``.
    """

    heads = "num_attention_heads"

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps, self.size = eps, getattr(config.arch, self.heads) * hidden_size
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.weight = norm_parameter(config, self.size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [s, b, n/t, d]. The result has the same shape and dtype.

        *Collectives* over tp: a sum [s, b] in the forward pass, and one in the backward pass.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        # A rank computes only the part of this sum's gradient that comes from its own heads, so the parts are summed
        # over tp.
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        weight = self.weight.chunk(self.group.size())[self.group.rank()].view(x.shape[-2:])
        return (wide * (squares / self.size + self.eps).rsqrt() * weight).to(x.dtype)


class WholeKeyNorm(WholeNorm):
    """Root-mean-square norm of the keys of all heads together."""

    heads = "num_kv_heads"


def head_norms_of(arch: Architecture) -> tuple[type[nn.Module] | None, type[nn.Module] | None]:
    """Return the classes of the norms of queries and of keys; (None, None) if these are not normalized."""
    if arch.whole_qk_norm:
        return WholeNorm, WholeKeyNorm
    if not arch.qk_norm:
        return None, None
    norm = norm_of(arch)
    if norm is RMSNorm and not arch.norm_after_rope:
        norm = HeadNorm
    return norm, norm
