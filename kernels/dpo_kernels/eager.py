"""The definition of every operation, in plain torch. Other backends are compared with this one."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.products import accumulate, wide, wide_product
from dpo_kernels.tree import Tree

CACHED_BYTES = 1 << 19
"""Of logits, as many rows as a CPU takes through all passes before it goes on to the next; they stay in its cache."""


class LinearStats(NamedTuple):
    """What one vocabulary shard contributes per row; every field [n] fp32, x a row's logits of the valid columns.

    maximum        m, the largest x; -inf where no column is valid
    sum_exp        sum of exp(x - m)
    target_logit   x of the target; 0 where that lies elsewhere
    sum_exp_twice  sum of exp(2 (x - m)), or None where moments were not asked for
    sum_exp_logit  sum of exp(x - m) x, likewise
    """

    maximum: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    sum_exp_twice: Tensor | None = None
    sum_exp_logit: Tensor | None = None


class KeptLogits(NamedTuple):
    """A chunk's logits and what their gradient needs besides: from ``linear_keep``, for ``linear_kept_grad``."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    start: int
    valid: int
    logit_scale: float
    softcap: float | None


def linear_logits(hidden: Tensor, weight: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """``softcap tanh(logit_scale hidden weight' / softcap)`` in fp32; without a soft cap, the scaled product."""
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
    """What one vocabulary shard of the output layer contributes to the log-probability of each target.

    hidden   [n, h]    rows to be scored
    weight   [v/t, h]  this shard of the output layer, of the dtype of ``hidden``
    targets  [n]       global token ids; ids outside this shard contribute nothing
    start              global id of the shard's first row
    valid              rows of ``weight`` that are real tokens, the rest is padding and takes no part
    chunk              at most so many rows have logits in memory at once
    logit_scale        factor of the logits; the soft cap comes after it
    softcap            logits become ``softcap tanh(logits / softcap)``
    moments            whether the two sums of moments are wanted too

    Returns  :class:`LinearStats`
    """
    parts = []
    for rows, row_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = linear_logits(rows, weight[:valid], logit_scale, softcap)
        parts.append(_stats(logits, row_targets, start, moments))
    columns = zip(*parts, strict=True)
    return LinearStats(*(None if column[0] is None else torch.cat(column) for column in columns))


def _stats(logits: Tensor, targets: Tensor, start: int, moments: bool) -> LinearStats:
    """Statistics of logits [n, valid] that exist."""
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
    """Rows that go through several passes together: on a CPU as many as stay in a core's cache."""
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(1, CACHED_BYTES // max(1, logits.shape[1] * logits.element_size()))


def _sums(logits: Tensor, maximum: Tensor, moments: bool) -> list[Tensor]:
    """Sums of exponentials of each row [n], and with ``moments`` those of their squares and of ``exp(x - m) x``."""
    weights = (logits - maximum[:, None]).exp_()
    sums = [weights.sum(dim=1)]
    if moments:
        sums += [weights.square().sum(dim=1), (weights * logits).sum(dim=1)]
    return sums


def _in_shard(targets: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor]:
    """Whether each target is among the valid columns [n], and a column to read in either case [n, 1]."""
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
    """Gradient of ``sum(grad * (target_logit - lse))`` for one shard of the output layer; logits are computed again.

    hidden, weight, targets, start, valid, chunk, logit_scale, softcap  as in :func:`linear_stats`
    lse       [n]       fp32, log of the partition function over all shards
    grad      [n]       fp32, gradient of each row's log-probability
    d_weight  [v/t, h]  the weight's gradient is added to it, in its dtype; None for a frozen weight

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
    """As :func:`linear_stats` for rows that make one chunk, whose logits stay until :func:`linear_kept_grad`.

    For a chunk of whole pairs whose reference is known, the loss's gradient is known as soon as the chunk's
    log-probabilities are: its logits need not be computed again.

    Returns  the statistics, and what :func:`linear_kept_grad` takes
    """
    logits = linear_logits(hidden, weight, logit_scale, softcap)
    kept = KeptLogits(logits, hidden, weight, targets, start, valid, logit_scale, softcap)
    return _stats(logits[:, :valid], targets, start, moments), kept


def linear_kept_grad(kept: KeptLogits, lse: Tensor, grad: Tensor, *, d_weight: Tensor | None) -> Tensor:
    """As :func:`linear_grad` for one chunk, from its kept logits, which it uses up."""
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
    """The two products of a linear layer's backward pass: adds to ``d_weight``, returns the gradient of ``hidden``."""
    if d_weight is not None:
        accumulate(d_weight, d_logits.T, hidden)
    return d_logits @ weight


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float | None = None) -> Tensor:
    """Attention of a tree's queries over what they see; differentiable.

    query       [n_q, heads, d]  the tokens ``tree.rows`` of the row
    key         [n, kv_heads, d] every token of the row; heads is a multiple of kv_heads
    value       [n, kv_heads, d_v]
    scale       factor of the scores, by default 1 / sqrt(d)

    Returns     [n_q, heads, d_v]  in the dtype of ``query``
    """
    first, stop = tree.seen_by(query.device)
    index = torch.arange(query.shape[0], device=query.device)[:, None]
    visible = (first <= index) & (index < stop)  # [n_q, n]
    q, k, v = (tensor.to(wide(query.dtype)) for tensor in (query, key, value))
    q = q.unflatten(1, (k.shape[1], -1))  # [n_q, kv_heads, group, d]
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2).to(query.dtype)
