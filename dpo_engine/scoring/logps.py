"""Sequence log-probabilities from vocabulary-sharded logits of one context-parallel share."""

from typing import Any

import torch
import torch.distributed as dist
from dpo_kernels import backend_name, shard_entropies, shard_grad, shard_stats
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups


def kernels_in_use() -> str:
    """Name of the kernel backend that log-probabilities are computed with."""
    return backend_name()


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, start: int, valid: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
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
        ctx.mark_non_differentiable(lse)
        return target_logit - lse, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, lse = ctx.saved_tensors
        return shard_grad(logits, targets, lse, grad, *ctx.shard), None, None, None, None


def _shard(width: int, vocab_size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """The first token of this rank's shard of ``width`` columns, and how many of the columns are real tokens."""
    start = group.rank() * width
    return start, min(max(vocab_size - start, 0), width)


def token_logps(logits: Tensor, targets: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under vocabulary-sharded logits.

    logits   [n, v/t]  this rank's shard, fp32 or bf16, not modified
    targets  [n]       global token ids in [0, vocab_size)
    vocab_size         real tokens; padding columns behind them are left out of the partition function

    Returns  [n]  fp32, nats, and the log of the partition function [n], fp32, without gradient; equal on every rank of
             ``group``

    *Collectives* over ``group`` (tp): forward MAX [n] and SUM [2, n]; backward none.
    """
    return _TokenLogps.apply(logits, targets, *_shard(logits.shape[1], vocab_size, group), group)


@torch.no_grad()
def token_entropies(logits: Tensor, lse: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """How spread each row's distribution over the vocabulary is; no gradient.

    logits   [n, v/t]  as in :func:`token_logps`, not modified
    lse      [n]       log of the partition function, from there

    Returns  entropy [n], ``-sum p log p``, and collision entropy [n], ``-log sum p^2``; fp32, nats, equal on every rank
             of ``group``

    *Collectives* over ``group`` (tp): SUM [2, n].
    """
    _, valid = _shard(logits.shape[1], vocab_size, group)
    sums = torch.stack(shard_entropies(logits, lse, valid))  # [2, n]
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    entropy, squares = sums
    return entropy, -squares.log()


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


def pair_logps(
    logits: Tensor, batch: Batch, *, vocab_size: int, groups: ParallelGroups, entropies: bool = False
) -> PairLogps:
    """Summed log-probabilities of each pair's two responses.

    logits     [s/cp, 2b, v/t]  last stage's output for this rank's share of ``batch``
    entropies  whether the distributions' entropies are summed too

    Returns  :class:`PairLogps`, equal on every tp and cp rank

    *Collectives*: over tp as :func:`token_logps`, and :func:`token_entropies` where asked; over cp forward SUM [2, 2b],
    or [4, 2b] with the entropies, backward none (identity: gradients of the shares meet when parameters' gradients are
    summed over ``dp_cp``).
    """
    labels = batch.labels.T  # [s/cp, 2b]
    scored = labels >= 0
    predicted, vocabulary = logits[scored], {"vocab_size": vocab_size, "group": groups.tp}
    tokens, lse = token_logps(predicted, labels[scored], **vocabulary)  # [n]
    rows = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)[scored]
    shared = (batch.positions[:, None] < batch.shared_end.repeat(2))[scored]  # [n]
    columns = [tokens, tokens * shared, *(token_entropies(predicted, lse, **vocabulary) if entropies else ())]
    empty = torch.zeros(len(columns), labels.shape[1], dtype=torch.float32, device=labels.device)
    sums = empty.index_add(1, rows, torch.stack(columns))  # [2 or 4, 2b]
    if groups.cp.size() > 1:
        sums = _SumOverShares.apply(sums, groups.cp)
    whole, *others = (row.chunk(2) for row in sums)
    return PairLogps(*whole, batch.chosen_tokens, batch.rejected_tokens, *(part for pair in others for part in pair))
