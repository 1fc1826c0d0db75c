"""Sequence log-probabilities from vocabulary-sharded logits of one context-parallel share."""

from typing import Any

import torch
import torch.distributed as dist
from dpo_kernels import backend_name, shard_grad, shard_stats
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups


def kernels_in_use() -> str:
    """Name of the kernel backend that log-probabilities are computed with."""
    return backend_name()


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, valid: int, group: dist.ProcessGroup) -> Tensor:
        maximum, sum_exp, target_logit = shard_stats(logits, targets, start, valid)
        if group.size() > 1:
            peak = maximum.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([sum_exp * (maximum - peak).exp(), target_logit])  # [2, n]
            dist.all_reduce(sums, group=group)
            maximum, (sum_exp, target_logit) = peak, sums
        lse = maximum + sum_exp.log()
        ctx.save_for_backward(logits, targets, lse)
        ctx.shard = (start, valid)
        return target_logit - lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, lse = ctx.saved_tensors
        return shard_grad(logits, targets, lse, grad, *ctx.shard), None, None, None, None


def token_logps(logits: Tensor, targets: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Log-probability of each target under vocabulary-sharded logits.

    logits   [n, v/t]  this rank's shard, fp32 or bf16, not modified
    targets  [n]       global token ids in [0, vocab_size)
    vocab_size         real tokens; padding columns behind them are left out of the partition function

    Returns  [n]  fp32, nats, equal on every rank of ``group``

    *Collectives* over ``group`` (tp): forward MAX [n] and SUM [2, n]; backward none.
    """
    width = logits.shape[1]
    start = group.rank() * width
    valid = min(max(vocab_size - start, 0), width)
    return _TokenLogps.apply(logits, targets, start, valid, group)


class _SumOverShares(torch.autograd.Function):
    """All-reduce forward, identity backward: every rank's share receives the gradient of the whole sum."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def pair_logps(logits: Tensor, batch: Batch, *, vocab_size: int, groups: ParallelGroups) -> PairLogps:
    """Summed log-probabilities of each pair's two responses.

    logits   [s/cp, 2b, v/t]  last stage's output for this rank's share of ``batch``

    Returns  :class:`PairLogps`, equal on every tp and cp rank

    *Collectives*: over tp as :func:`token_logps`; over cp forward SUM [2, 2b], backward none (identity: gradients of
    the shares meet when parameters' gradients are summed over ``dp_cp``).
    """
    labels = batch.labels.T  # [s/cp, 2b]
    scored = labels >= 0
    tokens = token_logps(logits[scored], labels[scored], vocab_size=vocab_size, group=groups.tp)  # [n]
    rows = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)[scored]
    shared = (batch.positions[:, None] < batch.shared_end.repeat(2))[scored]  # [n]
    empty = torch.zeros(labels.shape[1], dtype=torch.float32, device=labels.device)
    sums = torch.stack([empty.index_add(0, rows, tokens), empty.index_add(0, rows, tokens * shared)])  # [2, 2b]
    if groups.cp.size() > 1:
        sums = _SumOverShares.apply(sums, groups.cp)
    (chosen, rejected), (chosen_shared, rejected_shared) = (row.chunk(2) for row in sums)
    return PairLogps(chosen, rejected, batch.chosen_tokens, batch.rejected_tokens, chosen_shared, rejected_shared)
