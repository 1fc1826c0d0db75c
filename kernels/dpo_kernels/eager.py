"""The backend ``eager``: the reference implementation in plain torch. Tests compare the other backends with it.

This module implements the groups ``head`` (output layer) and ``attention``, and imports the group ``layer`` from
:mod:`~dpo_kernels.eager_layer`.

Problem. The log-probability of a target is its logit minus the log-sum-exp of all logits. The output layer's weight is
sharded by vocabulary, so no rank has all logits of a row, and the logits of all rows together need too much memory.
This package must not communicate, so each operation ends where an all-reduce is needed.

Solution. Let x be the logits of one row in one shard. For each row, :func:`linear_stats` returns the maximum m of x,
the sum of exp(x - m), and the target's logit. The target's logit is set to 0 if the target is in another shard. From
these values, the caller computes the log-probability with a MAX and a SUM all-reduce over the shards. At any time, at
most ``chunk`` rows have logits in memory. :func:`linear_grad` takes the global log-sum-exp and the gradient of each
row's log-probability. It computes the logits of a chunk again, and overwrites them with their gradient,
``grad * (onehot - softmax)``. With a soft cap, it overwrites a copy of the logits, because the derivative of the cap
needs the logits. Two matrix products then give the gradients of the hidden states and of the weight. If a chunk's loss
depends only on that chunk, the caller can use :func:`linear_keep` and :func:`linear_kept_grad`. They keep the logits
between the forward pass and the gradient, and need three matrix products instead of four.

Why this way. Subtracting the maximum keeps the exponentials finite. The sums of different shards are scaled to a common
maximum before they are merged. Forward pass and gradient are two functions rather than one autograd function, because
the all-reduces and the loss come between them. Matrix products of 16-bit operands are summed in fp32, and products of
fp64 operands in fp64. ``d_weight`` is accumulated in place, so the fp32 gradient buffer of the training framework can
be passed directly.

Not covered. This backend always stores the logits of a chunk, in fp32, or in fp64 for fp64 operands. The backend
``triton`` needs less memory: its ``linear_stats`` stores no logits, and its ``linear_grad`` stores only their gradient.
The output layer has no bias, and each row has one target, without label smoothing. :func:`tree_attention` stores all
scores, visible or not, so use another backend for long rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.eager_layer import gated as gated
from dpo_kernels.eager_layer import rms_norm as rms_norm
from dpo_kernels.eager_layer import rotate as rotate
from dpo_kernels.eager_layer import split_heads as split_heads
from dpo_kernels.products import accumulate, wide, wide_product
from dpo_kernels.tree import Tree

CACHED_BYTES = 1 << 19
"""Maximum bytes of a block of several rows of logits on a CPU. Such a block stays in a core's cache between passes."""


class LinearStats(NamedTuple):
    """One vocabulary shard's contribution to the log-probability of each row.

    Each field is [n], in fp32 (fp64 for fp64 operands). In the definitions, x stands for the row's logits in the valid
    columns.

    maximum        m, the largest x; -inf if no column is valid
    sum_exp        sum of exp(x - m)
    target_logit   x of the target; 0 if the target is in another shard
    sum_exp_twice  sum of exp(2 (x - m)), or None without moments
    sum_exp_logit  sum of exp(x - m) x, or None without moments
    """

    maximum: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    sum_exp_twice: Tensor | None = None
    sum_exp_logit: Tensor | None = None


class KeptLogits(NamedTuple):
    """A chunk's logits and the other inputs of their gradient, passed from ``linear_keep`` to ``linear_kept_grad``."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    start: int
    valid: int
    logit_scale: float
    softcap: float | None


def linear_logits(hidden: Tensor, weight: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Compute ``softcap * tanh(logit_scale * hidden @ weight.T / softcap)``; without ``softcap``, there is no tanh.

    The result is in fp32, or in fp64 for fp64 operands.
    """
    logits = wide_product(hidden, weight.T)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    start: int,
    valid: int,
    *,
    chunk: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    moments: bool = False,
) -> LinearStats:
    """Compute one vocabulary shard's contribution to the log-probability of each target.

    hidden   [n, h]    rows to score
    weight   [v/t, h]  this shard of the output layer, in the dtype of ``hidden``
    targets  [n]       global token ids; for an id outside this shard, ``target_logit`` is 0
    start              global token id of the first row of ``weight``
    valid              number of rows of ``weight`` that belong to tokens; the other rows are padding and are ignored
    chunk              maximum number of rows whose logits are in memory at once
    logit_scale        factor for the logits, applied before the soft cap
    softcap            if given, logits become ``softcap * tanh(logits / softcap)``
    moments            whether to also compute ``sum_exp_twice`` and ``sum_exp_logit``

    Returns  :class:`LinearStats`
    """
    parts = []
    for rows, row_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = linear_logits(rows, weight[:valid], logit_scale, softcap)
        parts.append(_stats(logits, row_targets, start, moments))
    columns = zip(*parts, strict=True)
    return LinearStats(*(None if column[0] is None else torch.cat(column) for column in columns))


def _stats(logits: Tensor, targets: Tensor, start: int, moments: bool) -> LinearStats:
    """Compute the statistics of given logits [n, valid]."""
    if logits.shape[1]:
        maximum = logits.amax(dim=1)
        here, local = _in_shard(targets, start, logits.shape[1])
        target_logit = logits.gather(1, local)[:, 0].where(here, 0.0)
    else:
        maximum, target_logit = logits.new_full((len(logits),), -torch.inf), logits.new_zeros(len(logits))
    rows = _rows_at_once(logits)
    blocks = [_sums(*block, moments) for block in zip(logits.split(rows), maximum.split(rows), strict=True)]
    sums = [torch.cat(column) for column in zip(*blocks, strict=True)]
    return LinearStats(maximum, sums[0], target_logit, *sums[1:])


def _rows_at_once(logits: Tensor) -> int:
    """Return the number of rows per block of logits: on a CPU, as many as fit in a core's cache; on a GPU, all rows."""
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(1, CACHED_BYTES // max(1, logits.shape[1] * logits.element_size()))


def _sums(logits: Tensor, maximum: Tensor, moments: bool) -> list[Tensor]:
    """Return each row's sum of exp(x - m) [n]; with ``moments``, also the sums of exp(2 (x - m)) and exp(x - m) x."""
    weights = (logits - maximum[:, None]).exp_()
    sums = [weights.sum(dim=1)]
    if moments:
        sums += [weights.square().sum(dim=1), (weights * logits).sum(dim=1)]
    return sums


def _in_shard(targets: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor]:
    """Return whether each target's column is valid, as [n], and the column clamped to valid columns, as [n, 1]."""
    local = targets - start
    return (local >= 0) & (local < valid), local.clamp(0, valid - 1)[:, None]


def linear_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    start: int,
    valid: int,
    *,
    chunk: int,
    d_weight: Tensor | None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Compute the gradient of ``sum(grad * (target_logit - lse))`` for one shard. The logits are computed again.

    hidden, weight, targets, start, valid, chunk, logit_scale, softcap  as in :func:`linear_stats`
    lse       [n]       fp32 (fp64 for fp64 operands), log-sum-exp of each row's logits over all shards
    grad      [n]       fp32 (fp64 for fp64 operands), gradient of each row's log-probability
    d_weight  [v/t, h]  the weight's gradient is added to this tensor, in its dtype; None for a frozen weight

    Returns  [n, h]  this shard's part of the gradient of ``hidden``, in the dtype of ``hidden``
    """
    parts = []
    columns = (hidden, targets, lse, grad)
    for rows, row_targets, row_lse, row_grad in zip(*(column.split(chunk) for column in columns), strict=True):
        logits = linear_logits(rows, weight, logit_scale, softcap)
        kept = KeptLogits(logits, rows, weight, row_targets, start, valid, logit_scale, softcap)
        parts.append(linear_kept_grad(kept, row_lse, row_grad, d_weight=d_weight))
    return torch.cat(parts)


def linear_keep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    start: int,
    valid: int,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    moments: bool = False,
) -> tuple[LinearStats, KeptLogits]:
    """Like :func:`linear_stats` for the rows of one chunk, but keep the logits for :func:`linear_kept_grad`.

    Use this function for a chunk of whole pairs if the reference's log-probabilities are known and the loss does not
    couple pairs. The gradient of the loss then follows from the chunk's own log-probabilities, so the logits need not
    be computed again.

    Returns  the statistics, and the argument for :func:`linear_kept_grad`
    """
    logits = linear_logits(hidden, weight, logit_scale, softcap)
    kept = KeptLogits(logits, hidden, weight, targets, start, valid, logit_scale, softcap)
    return _stats(logits[:, :valid], targets, start, moments), kept


def linear_kept_grad(kept: KeptLogits, lse: Tensor, grad: Tensor, *, d_weight: Tensor | None) -> Tensor:
    """Like :func:`linear_grad`, but for one chunk whose logits were kept. The call can overwrite these logits."""
    d_logits = kept.logits if kept.softcap is None else kept.logits.clone()
    d_logits[:, kept.valid :] = 0
    if kept.valid:
        shard = d_logits[:, : kept.valid]
        columns = (shard, lse[:, None], -grad[:, None])
        for rows, row_lse, factor in zip(*(column.split(_rows_at_once(shard)) for column in columns), strict=True):
            rows.sub_(row_lse).exp_().mul_(factor)
        here, local = _in_shard(kept.targets, kept.start, kept.valid)
        shard.scatter_add_(1, local, grad.to(shard.dtype).where(here, 0.0)[:, None])
    if kept.softcap is not None:
        d_logits.mul_(1 - (kept.logits / kept.softcap).square())
    if kept.logit_scale != 1.0:
        d_logits.mul_(kept.logit_scale)
    return linear_products(d_logits.to(kept.weight.dtype), kept.hidden, kept.weight, d_weight)


def linear_products(d_logits: Tensor, hidden: Tensor, weight: Tensor, d_weight: Tensor | None) -> Tensor:
    """Run the backward pass of a linear layer, and return the gradient of ``hidden``.

    The weight's gradient is added to ``d_weight``, unless ``d_weight`` is None.
    """
    if d_weight is not None:
        accumulate(d_weight, d_logits.T, hidden)
    return d_logits @ weight


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the attention of a tree's queries over the tokens that they see. The result is differentiable.

    query       [n_q, heads, d]     queries of the tokens ``tree.rows``
    key         [n, kv_heads, d]    keys of all tokens of the row; heads is a multiple of kv_heads
    value       [n, kv_heads, d_v]  values of all tokens of the row
    scale       factor for the scores; the default is 1 / sqrt(d)
    window      maximum number of tokens that a query sees: its own token, and the last tokens before that token on the
                path from the root; None: no maximum
    softcap     if given, scores become ``softcap * tanh(score / softcap)``
    sinks       [heads]  if given, each head has an additional key with this score and with value 0. The soft cap does
                not apply to this score

    Returns     [n_q, heads, d_v]  in the dtype of ``query``
    """
    first, stop = tree.seen_by(query.device)
    index = torch.arange(query.shape[0], device=query.device)[:, None]
    visible = (first <= index) & (index < stop)  # [n_q, n]
    if tree.effective(window) is not None:
        queries_at, keys_at = tree.places(query.device)
        visible &= queries_at[:, None] - keys_at < window
    q, k, v = (tensor.to(wide(query.dtype)) for tensor in (query, key, value))
    q = q.unflatten(1, (k.shape[1], -1))  # [n_q, kv_heads, group, d]
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        columns = sinks.to(scores.dtype).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, columns], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(tree.first)]
    return torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2).to(query.dtype)
