"""Triton kernels for root-mean-square norms over the last axis.

All arithmetic is in fp32. Each program sums the gradient of the weight over its own rows, without atomic additions, so
results are deterministic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256
"""Largest number of programs in the backward pass. Each program writes one partial sum of the weight's gradient."""


@triton.jit(do_not_specialize=["offset", "eps", "width"])
def _norm_forward(states, weight, out, offset, eps, width, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    values = tl.load(states + at, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(out + at, (values * scale * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["offset", "eps", "width", "rows"])
def _norm_backward(states, weight, d_out, d_states, sums, offset, eps, width, rows, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = columns < width
    total = tl.zeros([PADDED], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * width.to(tl.int64) + columns
        values = tl.load(states + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
        normed = values * scale
        total += grad * normed
        grad *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
        d_values = scale * (grad - normed * (tl.sum(grad * normed, 0) / width))
        tl.store(d_states + at, d_values.to(d_states.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + columns, total, mask=mask)


def _options(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "num_warps": min(max(padded // 256, 1), 16)}


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        states = states.contiguous()
        ctx.save_for_backward(states, weight)
        ctx.eps, ctx.offset = eps, offset
        out, width = torch.empty_like(states), states.shape[-1]
        if states.numel():
            _norm_forward[(states.numel() // width,)](states, weight, out, offset, eps, width, **_options(width))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        states, weight = ctx.saved_tensors
        d_states, width = torch.empty_like(states), states.shape[-1]
        rows = states.numel() // width
        sums = states.new_empty(min(rows, PROGRAMS), width, dtype=torch.float32)
        if rows:
            _norm_backward[(len(sums),)](
                states, weight, d_out.contiguous(), d_states, sums, ctx.offset, ctx.eps, width, rows, **_options(width)
            )
        return d_states, sums.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Like :func:`dpo_kernels.eager_layer.rms_norm`. Raises ``ValueError`` for fp64."""
    if x.dtype == torch.float64:
        raise ValueError("triton rms_norm: does not support fp64, because it computes in fp32; use the backend eager")
    return _RMSNorm.apply(x, weight, eps, offset)
