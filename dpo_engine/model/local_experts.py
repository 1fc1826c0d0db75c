"""The engine's own modules for experts with biases, and for experts with a clamped gate.

Megatron's experts with biases have two problems. They add a bias in place to the output of a linear layer, and torch's
autograd refuses this. They also cannot be sharded, because each rank would add the whole bias of the second matrix to
its partial sum of the output. Here, this bias is sharded too, and each rank adds its shard to the matching columns
of its partial sum. Each element is therefore added once, and its gradient exists on one rank only. The linear layers
and the names of the parameters are Megatron's.

Not covered: grouped matrix products. A rank computes its experts one after the other.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from dpo_engine.model.mixture import Experts
from dpo_kernels import gated


class _ClampedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, clamp: float, slope: float) -> Tensor:
        ctx.save_for_backward(both)
        ctx.clamp, ctx.slope = clamp, slope
        gate, up = both.chunk(2, dim=-1)
        gate = gate.clamp(max=clamp)
        return (gate * slope).sigmoid_().mul_(gate).mul_(up.clamp(-clamp, clamp).add_(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        free, inside = gate <= ctx.clamp, up.abs() <= ctx.clamp
        gate = gate.clamp(max=ctx.clamp)
        share = (gate * ctx.slope).sigmoid_()
        out = torch.empty_like(both)
        d_gate, d_up = out.chunk(2, dim=-1)
        # d/dx x sigmoid(a x) = s + a x s (1 - s), where s = sigmoid(a x)
        slopes = (1 - share).mul_(gate).mul_(ctx.slope).add_(1).mul_(share)
        torch.mul(grad, up.clamp(-ctx.clamp, ctx.clamp).add_(1), out=d_gate)
        d_gate.mul_(slopes).mul_(free)
        torch.mul(grad, share.mul_(gate), out=d_up)
        d_up.mul_(inside)
        return out, None, None


def clamped_gate(both: Tensor, clamp: float, slope: float) -> Tensor:
    """Limit ``gate`` and ``up``. Then compute ``gate * sigmoid(slope * gate) * (up + 1)``.

    both     [..., 2 f]  ``gate`` and ``up``, concatenated. ``gate`` is limited to at most ``clamp``, and ``up`` to
             between ``-clamp`` and ``clamp``; the gradient of a value beyond its limits is zero
    Returns  [..., f]

    Only the input is saved for the backward pass.

    *Source*: the reference implementation of gpt-oss, and its model card (arXiv 2508.10925) section 2.2.
    """
    return _ClampedGate.apply(both, clamp, slope)


class LocalExpert(nn.Module):
    """One expert, or this rank's shard of an expert.

    It has two linear layers. The first layer computes ``gate`` and ``up``.
    """

    def __init__(self, config: Any, group: Any):
        super().__init__()
        self.experts: Experts = config.arch.experts
        hidden, width, has_bias = config.hidden_size, self.experts.ffn_hidden_size, self.experts.biases
        common = {"config": config, "is_expert": True, "skip_bias_add": True, "tp_group": group}
        column = partial(ColumnParallelLinear, **common, init_method=config.init_method, gather_output=False)
        self.linear_fc1 = column(hidden, 2 * width, bias=has_bias, stride=2)
        self.linear_fc2 = RowParallelLinear(
            width, hidden, **common, bias=False, input_is_parallel=True, init_method=config.output_layer_init_method
        )
        if has_bias:
            part, device = hidden // group.size(), torch.cuda.current_device()
            self.columns = slice(group.rank() * part, (group.rank() + 1) * part)
            self.linear_fc2.bias = nn.Parameter(torch.empty(part, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.linear_fc2.bias, is_parallel=True, dim=0, stride=1)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Compute the expert's output, multiplied by the tokens' weights.

        If the expert is sharded, compute only this rank's partial sum of the result.

        tokens   [n, h]       weights  [n] in at least fp32
        Returns  [n, h]
        """
        weights = weights[:, None]
        inside, bias = self.linear_fc1(tokens)
        if bias is not None:
            inside = inside + bias
        clamp = self.experts.clamp
        active = gated(inside, "silu") if clamp is None else clamped_gate(inside, clamp, self.experts.slope)
        out, bias = self.linear_fc2((active * weights).to(active.dtype))
        return out if bias is None else _add_columns(out, (bias * weights).to(out.dtype), self.columns)


def _add_columns(out: Tensor, part: Tensor, columns: slice) -> Tensor:
    if part.shape == out.shape:
        return out + part
    return out + torch.nn.functional.pad(part, (columns.start, out.shape[1] - columns.stop))


class LocalExperts(nn.Module):
    """The experts of a layer on this rank, with Megatron's constructor arguments and names of parameters."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, **megatron: Any):
        super().__init__()
        experts = (LocalExpert(config, pg_collection.expt_tp) for _ in range(num_local_experts))
        self.local_experts = nn.ModuleList(experts)

    def forward(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Compute the outputs of the experts for their tokens, which are sorted by expert.

        tokens   [n, h]
        counts   [e / ep]  number of tokens of each expert
        weights  [n]       weight of the expert for each token, in at least fp32
        Returns  [n, h], and None instead of a bias, because the biases are already added
        """
        sizes = counts.tolist()
        parts = zip(self.local_experts, tokens.split(sizes), weights.split(sizes), strict=True)
        return torch.cat([expert(own, share) for expert, own, share in parts]), None
