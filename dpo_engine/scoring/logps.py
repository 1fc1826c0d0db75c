"""Compute the log-probabilities of responses, and their gradients, without storing all logits of a micro-batch.

Problem. A token's log-probability is a log-softmax over the whole vocabulary. For 8192 tokens and 128k vocabulary
entries, fp32 logits take 4 GiB, and the gradient of the logits takes another 4 GiB. The vocabulary is sharded over TP,
and the tokens are sharded over CP. The gradient of the logits depends on the loss, and the loss depends on sums over
all tokens of a pair. An implementation that saves memory therefore normally computes all logits twice: once for the
sums and once for the gradient.

Solution. This module receives only the hidden states at scored sites, that is, at tokens that predict a response token.
It processes the sites in chunks of whole pairs. A chunk has at most ``CHUNK_SITES`` sites, unless a single pair has
more. For each chunk, ``dpo_kernels`` computes statistics of this rank's vocabulary shard (maximum, sum of exponentials,
target logit).
`Vocabulary.together` combines the statistics into log-probabilities, with a MAX and a SUM over TP. `_pair_sums` sums
the log-probabilities for each response, with a SUM over CP. A pair's loss depends on no other pair, and the reference's
values are known beforehand. The loss and the gradient of a chunk are therefore computed while its logits are still in
memory, so each logit is computed only once. The gradient of the hidden states is stored until the backward pass. The
gradient of the output layer's weight is added directly to Megatron's gradient buffer.

Why this way. Apart from the two gradients, the additional memory is one chunk of logits, however long the sequences
are. Forward and backward need at least three matrix products. For chunks of whole pairs, this module computes exactly
three; recomputing the logits would add a fourth. Sums over tokens are in fp32, or in fp64 for fp64 models. Kernels do
not communicate, so they need no process groups.

Not covered. Losses that couple pairs run in two passes (see ``training/step.py``): the first pass scores without
gradients, and the second pass multiplies each log-probability by a fixed coefficient. If a pair has more than
``CHUNK_SITES`` sites, the pair is scored in pieces, and the logits of the pieces are computed again for the gradient.
In layout `tree`, adjacent pairs with the same prompt form one tree and can share sites, so all pairs of a tree are
treated as one pair. The incoming gradient of the result must be 1, because the weight's gradient has already been
added. Entropies have no gradient, and second derivatives are not available.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.batching.batches import CHUNK_SITES, Batch
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups
from dpo_kernels import (
    KeptLogits,
    LinearStats,
    backends_in_use,
    linear_grad,
    linear_keep,
    linear_kept_grad,
    linear_stats,
)


def kernels_in_use() -> str:
    """Return the names of the kernel backends in use, with the operations that each backend runs."""
    return backends_in_use()


class Vocabulary:
    """One rank's shard of the vocabulary.

    width        number of rows that the output layer's weight has on each rank
    vocab_size   number of tokens in the vocabulary; padding rows of the output layer are excluded from the softmax
    """

    def __init__(self, width: int, vocab_size: int, group: dist.ProcessGroup):
        self.group = group
        self.start = group.rank() * width
        self.valid = min(max(vocab_size - self.start, 0), width)

    def together(self, stats: LinearStats) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Combine the statistics of all vocabulary shards.

        Returns  log-probability and log of the softmax denominator, [n] each; entropy and collision entropy, [n] each,
                 or None if ``stats`` has no moments (the two sums that only entropies need); all in nats, in the dtype
                 of the statistics

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


def _pair_sums(
    tokens: Sequence[Tensor | None], batch: Batch, entries: slice, pairs: slice, groups: ParallelGroups
) -> Tensor:
    """Sum values over the tokens of each response.

    tokens    log-probabilities [m] of the sites, followed by other values to sum, each [m] or None
    entries   the entries of ``batch.scored`` to sum
    pairs     the pairs to which these entries belong

    Returns   [2 + others, 2, pairs]. First axis: sums of the log-probabilities over all scored tokens; sums of the
              log-probabilities over the first n scored tokens, where n is the smaller of the pair's two numbers of
              scored tokens; sums of the other values. Second axis: chosen, rejected.

    *Collectives*: SUM of the result over cp.
    """
    scored, count = batch.scored, pairs.stop - pairs.start
    take, shared = scored.take[entries], scored.shared[entries]
    whole, *others = (column[take] for column in tokens if column is not None)
    columns = torch.stack([whole, whole * shared, *others])
    side, place = scored.owner[entries] // len(batch.index), scored.owner[entries] % len(batch.index)
    sums = columns.new_zeros(len(columns), 2 * count).index_add_(1, side * count + place - pairs.start, columns)
    if groups.cp.size() > 1:
        dist.all_reduce(sums, group=groups.cp)
    return sums.unflatten(1, (2, count))


def _record(sums: Tensor, batch: Batch, pairs: slice) -> PairLogps:
    whole, *others = sums.unbind(0)
    counts = batch.chosen_tokens[pairs], batch.rejected_tokens[pairs]
    return PairLogps(*whole, *counts, *(part for both in others for part in both))


@torch.no_grad()
def pair_logps(
    hidden: Tensor,
    head: Tensor,
    batch: Batch,
    *,
    vocab_size: int,
    groups: ParallelGroups,
    softcap: float | None = None,
    entropies: bool = False,
) -> PairLogps:
    """Compute the summed log-probabilities of each pair's two responses, without gradient.

    hidden      [m, h]    hidden states at the scored sites of this rank's share of ``batch``
    head        [v/t, h]  this rank's shard of the output layer
    vocab_size            number of tokens in the vocabulary; padding rows of ``head`` are excluded from the softmax
    softcap               if given, logits become ``softcap * tanh(logits / softcap)``
    entropies             whether to also sum the entropies of the predicted distributions

    Returns  :class:`PairLogps`, equal on every tp and cp rank

    *Collectives*: over tp, MAX [m] and SUM [2, m], or [4, m] with entropies; over cp, SUM [2, 2b], or [4, 2b] with
    entropies.
    """
    vocabulary = Vocabulary(head.shape[0], vocab_size, groups.tp)
    shard = (vocabulary.start, vocabulary.valid)
    stats = linear_stats(
        hidden, head, batch.scored.targets, *shard, chunk=CHUNK_SITES, softcap=softcap, moments=entropies
    )
    logps, _, *spread = vocabulary.together(stats)
    pairs = slice(0, len(batch.index))
    return _record(_pair_sums([logps, *spread], batch, slice(None), pairs, groups), batch, pairs)


@torch.no_grad()
def site_logps(
    hidden: Tensor,
    head: Tensor,
    batch: Batch,
    *,
    vocab_size: int,
    groups: ParallelGroups,
    softcap: float | None = None,
) -> Tensor:
    """Compute the log-probability of the target of each scored site, without gradient and without storing all logits.

    hidden, head, vocab_size, softcap   as for :func:`pair_logps`

    Returns  [m] in nats, for the sites of this context-parallel rank; equal on every tp rank

    *Collectives*: over tp, MAX [m] and SUM [2, m].
    """
    vocabulary = Vocabulary(head.shape[0], vocab_size, groups.tp)
    shard = vocabulary.start, vocabulary.valid
    stats = linear_stats(hidden, head, batch.scored.targets, *shard, chunk=CHUNK_SITES, softcap=softcap, moments=False)
    return vocabulary.together(stats)[0]


Contribution = Callable[[PairLogps, slice], tuple[Tensor, Tensor]]
"""A function of the log-probabilities of a range of pairs.

It returns the term that these pairs add to the scalar that :func:`pair_losses` differentiates, and their losses."""


def pair_losses(
    hidden: Tensor,
    head: Tensor,
    batch: Batch,
    contribution: Contribution,
    *,
    vocab_size: int,
    groups: ParallelGroups,
    softcap: float | None = None,
    entropies: bool = False,
) -> tuple[Tensor, Tensor, PairLogps]:
    """Compute the losses of a micro-batch's pairs and, in the same pass, the gradients of the scalar to differentiate.

    hidden, head, vocab_size, softcap, entropies   as for :func:`pair_logps`
    contribution   called as ``(logps, pairs)`` for each range of pairs in turn; returns the term that these pairs add
                   to the scalar, differentiable with respect to ``logps``, and the losses of these pairs

    A pair's gradient depends only on its own log-probabilities. Each chunk of whole pairs therefore runs backward as
    soon as it is scored, and its logits are computed once. If a pair has more than ``CHUNK_SITES`` sites, the pair is
    scored in pieces, and its logits are computed twice.

    Returns  the scalar, the losses [b], and :class:`PairLogps`, the last two without gradient. The incoming gradient of
             the scalar must be 1, because the gradient of ``head`` has already been added to ``head.main_grad``

    *Collectives*: for each chunk, those of :func:`pair_logps`; none in backward. Each cp and tp rank returns its own
    part of the gradients. The parts of cp ranks are summed when the parameters' gradients are reduced over ``dp_cp``.
    For ``hidden``, :class:`~dpo_engine.model.policy.Policy` sums the parts of tp ranks.
    """
    kept: list[tuple[Tensor, PairLogps]] = []
    total = _LossOfChunks.apply(hidden, head, batch, contribution, vocab_size, groups, softcap, entropies, kept)
    losses, records = zip(*kept, strict=True)
    fields = (None if parts[0] is None else torch.cat(parts) for parts in zip(*records, strict=True))
    return total, torch.cat(losses), PairLogps(*fields)


class _LossOfChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        batch: Batch,
        contribution: Contribution,
        vocab_size: int,
        groups: ParallelGroups,
        softcap: float | None,
        entropies: bool,
        kept: list[tuple[Tensor, PairLogps]],
    ) -> Tensor:
        vocabulary = Vocabulary(head.shape[0], vocab_size, groups.tp)
        d_head, given = weight_gradient(head) if ctx.needs_input_grad[1] else (None, None)
        d_hidden = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        start = (0, 0, 0)
        for stop in batch.scored.chunks:
            sites, entries, pairs = (slice(low, high) for low, high in zip(start, stop, strict=True))
            start = stop
            chunk = _Chunk(hidden[sites], head, batch.scored.targets[sites], vocabulary, softcap, entropies)
            own = batch.scored._replace(take=batch.scored.take - sites.start)
            sums = _pair_sums(chunk.tokens, replace(batch, scored=own), entries, pairs, groups)
            with torch.enable_grad():
                leaf = sums.requires_grad_()
                scalar, losses = contribution(_record(leaf, batch, pairs), pairs)
                (grad,) = torch.autograd.grad(scalar, leaf, materialize_grads=True, allow_unused=True)
            total += scalar.detach()
            kept.append((losses.detach(), _record(sums.detach(), batch, pairs)))
            d_hidden[sites] = chunk.backward(_token_gradient(grad, batch, sites, entries, pairs), d_head)
        ctx.save_for_backward(d_hidden)
        ctx.given = given
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), ctx.given, *[None] * 7


def _token_gradient(grad: Tensor, batch: Batch, sites: slice, entries: slice, pairs: slice) -> Tensor:
    """Return the gradient with respect to each site's log-probability, [sites].

    grad   gradient with respect to the sums of :func:`_pair_sums`, [>= 2, 2, pairs]
    """
    scored, count = batch.scored, pairs.stop - pairs.start
    side, place = scored.owner[entries] // len(batch.index), scored.owner[entries] % len(batch.index)
    whole, shared = grad[:2].flatten(1)[:, side * count + place - pairs.start]
    taken = whole + shared * scored.shared[entries]
    return grad.new_zeros(sites.stop - sites.start).index_add_(0, scored.take[entries] - sites.start, taken)


class _Chunk:
    """Sites that are scored together.

    The constructor runs the forward pass; :meth:`backward` runs the backward pass.

    tokens   log-probability [m]; entropy and collision entropy, each [m] or None
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        vocabulary: Vocabulary,
        softcap: float | None,
        entropies: bool,
    ):
        self.inputs = (hidden, head, targets)
        self.softcap = softcap
        self.shard = (vocabulary.start, vocabulary.valid)
        self.logits: KeptLogits | None = None
        if len(hidden) <= CHUNK_SITES:
            stats, self.logits = linear_keep(*self.inputs, *self.shard, softcap=softcap, moments=entropies)
        else:
            options = {"chunk": CHUNK_SITES, "softcap": softcap}
            stats = linear_stats(*self.inputs, *self.shard, **options, moments=entropies)
        logps, self.lse, *spread = vocabulary.together(stats)
        self.tokens = [logps, *spread]

    def backward(self, grad: Tensor, d_head: Tensor | None) -> Tensor:
        """Return the gradient of the hidden states [m, h], and add the gradient of the output layer to ``d_head``.

        grad   [m]  gradient of the log-probabilities
        """
        if self.logits is not None:
            return linear_kept_grad(self.logits, self.lse, grad, d_weight=d_head)
        options = {"chunk": CHUNK_SITES, "softcap": self.softcap}
        return linear_grad(*self.inputs, self.lse, grad, *self.shard, **options, d_weight=d_head)


def weight_gradient(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the tensor to which the weight's gradient must be added, and the gradient (or None) to return to autograd.

    Megatron's DDP accumulates gradients in its own buffer, ``main_grad``, so this function returns the buffer and
    None. There are three exceptions:

    - If DDP reduces the buffer while backward is still running (``weight.counted``), DDP waits until autograd has
      returned a gradient for every weight. DDP then adds the returned gradient to the buffer, unless
      ``grad_added_to_main_grad`` is set. This function therefore sets this flag, and returns an uninitialized gradient.
    - If, in addition, the weight may be tied to the embedding (``zero_out_wgrad``), DDP always adds the returned
      gradient, so this function returns zeros.
    - For a weight without ``main_grad``, this function returns the same new tensor twice.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        made = torch.zeros_like(weight)
        return made, made
    if not getattr(weight, "counted", False):
        return buffer, None
    if getattr(weight, "zero_out_wgrad", False):
        return buffer, torch.zeros_like(weight)
    weight.grad_added_to_main_grad = True
    return buffer, torch.empty_like(weight)
