"""Sequence log-probabilities from hidden states and the vocabulary-sharded output layer, logits a chunk at a time."""

from typing import Any

import torch
import torch.distributed as dist
from dpo_kernels import LinearStats, backends_in_use, linear_grad, linear_stats
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups

CHUNK = 1024
"""Rows whose logits exist at once."""


def kernels_in_use() -> str:
    """Names of the kernel backends, by what they compute."""
    return backends_in_use()


class Vocabulary:
    """One rank's shard of the vocabulary.

    width        rows of the output layer's weight on each rank
    vocab_size   real tokens; padding rows behind them are left out of the partition function
    """

    def __init__(self, width: int, vocab_size: int, group: dist.ProcessGroup):
        self.group = group
        self.start = group.rank() * width
        self.valid = min(max(vocab_size - self.start, 0), width)

    def together(self, stats: LinearStats) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All shards' statistics as one.

        Returns  log-probability and log of the partition function [n]; entropy and collision entropy [n], None where
                 the statistics have no moments; fp32, nats

        *Collectives* over tp: MAX [n] and SUM [2, n], or [4, n] with moments.
        """
        peak = stats.maximum
        if self.group.size() > 1:
            peak = stats.maximum.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group)
        scale = (stats.maximum - peak).exp()
        columns = [stats.sum_exp * scale, stats.target_logit]
        if stats.sum_exp_twice is not None:
            columns += [stats.sum_exp_twice * scale.square(), stats.sum_exp_logit * scale]
        sums = torch.stack(columns)
        if self.group.size() > 1:
            dist.all_reduce(sums, group=self.group)
        lse = peak + sums[0].log()
        if stats.sum_exp_twice is None:
            return sums[1] - lse, lse, None, None
        return sums[1] - lse, lse, lse - sums[3] / sums[0], 2 * (lse - peak) - sums[2].log()


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, vocabulary: Vocabulary, entropies: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shard = (vocabulary.start, vocabulary.valid)
        stats = linear_stats(hidden, head, targets, *shard, chunk=CHUNK, moments=entropies)
        logps, lse, entropy, collision = vocabulary.together(stats)
        ctx.save_for_backward(hidden, head, targets, lse)
        ctx.shard = shard
        if entropies:
            ctx.mark_non_differentiable(entropy, collision)
        return logps, entropy, collision

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, head, targets, lse = ctx.saved_tensors
        own, given = weight_gradient(head) if ctx.needs_input_grad[1] else (None, None)
        d_hidden = linear_grad(hidden, head, targets, lse, grad, *ctx.shard, chunk=CHUNK, d_weight=own)
        return d_hidden, given, None, None, None


def weight_gradient(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a weight's gradient is added up, and what autograd is given for it.

    Megatron's DDP has a buffer for it, in fp32, and counts the weights that autograd has given a gradient. Unless a
    weight is marked as done, it adds that one to the buffer; it always does for one that may be the embedding too.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        made = torch.zeros_like(weight)
        return made, made
    if getattr(weight, "zero_out_wgrad", False):
        return buffer, torch.zeros_like(weight)
    weight.grad_added_to_main_grad = True
    return buffer, torch.empty_like(weight)


def token_logps(
    hidden: Tensor, head: Tensor, targets: Tensor, *, vocab_size: int, group: dist.ProcessGroup, entropies: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability of each target.

    hidden   [n, h]    the same on every tp rank
    head     [v/t, h]  this rank's shard of the output layer
    targets  [n]       global token ids in [0, vocab_size)
    vocab_size         real tokens; padding rows behind them are left out of the partition function

    Returns  [n] fp32, nats, equal on every rank of ``group``; entropy and collision entropy of the distributions [n],
             without gradient, None where not asked for

    The gradient of ``hidden`` is this rank's part; that of ``head`` is added to its ``main_grad`` where it has one.

    *Collectives* over ``group`` (tp): forward MAX [n] and SUM [2, n], or [4, n] with entropies; backward none.
    """
    return _TokenLogps.apply(hidden, head, targets, Vocabulary(head.shape[0], vocab_size, group), entropies)


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
    hidden: Tensor, head: Tensor, batch: Batch, *, vocab_size: int, groups: ParallelGroups, entropies: bool = False
) -> PairLogps:
    """Summed log-probabilities of each pair's two responses.

    hidden     [m, h]    hidden states of this rank's share of ``batch`` at its scored sites
    head       [v/t, h]  this rank's shard of the output layer
    entropies  whether the distributions' entropies are summed too

    Returns  :class:`PairLogps`, equal on every tp and cp rank

    *Collectives*: over tp as :func:`token_logps`; over cp forward SUM [2, 2b], or [4, 2b] with the entropies, backward
    none (identity: gradients of the shares meet when parameters' gradients are summed over ``dp_cp``).
    """
    scored = batch.scored
    found = token_logps(hidden, head, scored.targets, vocab_size=vocab_size, group=groups.tp, entropies=entropies)
    tokens, *spread = (column[scored.take] for column in found if column is not None)  # [e]
    columns = torch.stack([tokens, tokens * scored.shared, *spread])
    empty = torch.zeros(len(columns), 2 * len(batch.index), dtype=columns.dtype, device=columns.device)
    sums = empty.index_add(1, scored.owner, columns)  # [2 or 4, 2b]
    if groups.cp.size() > 1:
        sums = _SumOverShares.apply(sums, groups.cp)
    whole, *others = (row.chunk(2) for row in sums)
    return PairLogps(*whole, batch.chosen_tokens, batch.rejected_tokens, *(part for pair in others for part in pair))
