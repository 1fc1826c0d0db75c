"""Tree attention by torch's scaled_dot_product_attention: work proportional to what is seen, on any device."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import eager
from dpo_kernels.tree import Tree

TILE = 128
"""queries of one masked call: on average half as many keys per query are computed and thrown away"""

SHORT = 64
"""tokens of neighbouring trees that take one call together: to start one for each segment costs more than they do"""


class Chain(NamedTuple):
    """A segment that continues no other, its first child, that one's first child, ...: neighbours in the row.

    prefix  what its ancestors are made of: (number of a part, how many of that part's tokens)
    start, stop  its tokens
    runs    its queries as runs without gaps: (index of the first in ``tree.rows``, its token, how many)
    """

    prefix: tuple[tuple[int, int], ...]
    start: int
    stop: int
    runs: tuple[tuple[int, int, int], ...]


class Together(NamedTuple):
    """Whole trees, neighbours in the row, of `SHORT` tokens at most.

    start, stop  their tokens
    low, high    their queries, as indices in ``tree.rows``
    """

    start: int
    stop: int
    low: int
    high: int


def parts(tree: Tree) -> list[Chain | Together]:
    """What is computed one after the other, in the order of the row: short trees together, others chain by chain."""
    roots = [*np.flatnonzero(tree.parents == -1).tolist(), len(tree.parents)]
    bounds = [*tree.starts.tolist(), tree.n]
    found: list[Chain | Together] = []
    first = 0
    while first < len(roots) - 1:
        last = first + 1
        while last < len(roots) - 1 and bounds[roots[last + 1]] - bounds[roots[first]] <= SHORT:
            last += 1
        start, stop = bounds[roots[first]], bounds[roots[last]]
        if stop - start <= SHORT:
            found.append(Together(start, stop, *np.searchsorted(tree.rows, [start, stop]).tolist()))
        else:
            found += _chains(tree, roots[first], roots[last], found)
        first = last
    return found


def _chains(tree: Tree, first: int, last: int, before: list[Chain | Together]) -> list[Chain]:
    """The chains of the tree of segments ``first`` to ``last``; they are numbered on from the parts ``before``."""
    heads = [s for s in range(first, last) if s == first or tree.parents[s] != s - 1]
    chain_of = np.searchsorted(heads, np.arange(first, last), side="right") - 1
    found: list[Chain] = []
    ends = [*tree.starts[heads[1:]].tolist(), int(tree.starts[last - 1] + tree.lengths[last - 1])]
    for head, stop in zip(heads, ends, strict=True):
        start, parent = int(tree.starts[head]), int(tree.parents[head])
        prefix: tuple[tuple[int, int], ...] = ()
        if parent >= 0:
            above = found[chain_of[parent - first]]
            fork = int(tree.starts[parent] + tree.lengths[parent])
            prefix = (*above.prefix, (len(before) + int(chain_of[parent - first]), fork - above.start))
        low, high = np.searchsorted(tree.rows, [start, stop])
        rows = tree.rows[low:high]
        firsts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        counts = np.diff(firsts, append=len(rows))
        runs = tuple((int(low + i), int(rows[i]), int(count)) for i, count in zip(firsts, counts, strict=True))
        found.append(Chain(prefix, start, stop, runs))
    return found


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float | None = None) -> Tensor:
    """As :func:`dpo_kernels.eager.tree_attention`.

    Trees that are short together are one call with a mask. Of others a run of queries that starts with its root is one
    causal call. What is left is cut into tiles, each one call over all that its last query sees, with a mask for the
    tile's own corner; ``causal_lower_right`` would do the whole run in one call, but on a CPU computes and holds the
    invisible half as well.
    """
    if not len(tree.rows):
        return eager.tree_attention(query, key, value, tree, scale)  # an empty result that knows its keys and values
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    value_width = value.shape[-1]
    width = max(query.shape[-1], value_width)
    # Fused kernels have one head dimension, and zeros change no product.
    q, k, v = (
        tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))
        for tensor in (query, key, value)
    )

    def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        found = F.scaled_dot_product_attention(
            *(_heads_first(tensor) for tensor in (queries, keys, values)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return found[0].transpose(0, 1)

    plan = tree.prepared("parts", lambda: parts(tree))
    widest = 1 << (tree.n - 1).bit_length()  # few masks do for rows of any length
    corner = _corner(widest, q.device, q.dtype)
    sizes = [part.stop - part.start for part in plan]
    key_parts, value_parts = k.split(sizes), v.split(sizes)
    visible = tree.prepared(("visible", q.device), lambda: _visible(tree, plan, q.device))
    outputs = []
    for number, part in enumerate(plan):
        if isinstance(part, Together):
            if part.low < part.high:
                queries = q[part.low : part.high]
                outputs.append(attend(queries, key_parts[number], value_parts[number], visible[number]))
            continue
        if not part.runs:
            continue
        _, token, count = part.runs[-1]
        path = [*part.prefix, (number, token + count - part.start)]
        keys, values = (_joined([cut[above][:many] for above, many in path]) for cut in (key_parts, value_parts))
        ancestors = sum(many for _, many in part.prefix)
        for index, token, count in part.runs:
            before = ancestors + token - part.start  # what the run's first query sees besides itself
            size = TILE if before else count
            for offset in range(0, count, size):
                many, reach = min(size, count - offset), before + offset
                mask = corner[:many, widest - reach : widest + many] if before else None
                queries = q[index + offset : index + offset + many]
                outputs.append(attend(queries, keys[: reach + many], values[: reach + many], mask))
    return torch.cat(outputs)[..., :value_width]


def _visible(tree: Tree, plan: list[Chain | Together], device: torch.device) -> dict[int, Tensor]:
    """By the number of a part of short trees, [queries, tokens] which of them each query sees; for all layers."""
    masks = {}
    for number, part in enumerate(plan):
        if isinstance(part, Together):
            first, stop = (ends[part.start : part.stop] for ends in (tree.first, tree.stop))
            index = np.arange(part.low, part.high)[:, None]
            masks[number] = torch.from_numpy((first <= index) & (index < stop))
    if not masks or device.type != "cuda":
        return masks
    flat = torch.cat([mask.flatten() for mask in masks.values()]).pin_memory().to(device, non_blocking=True)
    cut = flat.split([mask.numel() for mask in masks.values()])
    return {number: mask.view(masks[number].shape) for number, mask in zip(masks, cut, strict=True)}


def _heads_first(tensor: Tensor) -> Tensor:
    """[n, heads, d] as [1, heads, n, d], a view: joining and cutting is cheapest by tokens."""
    return tensor.transpose(0, 1)[None]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=8)
def _corner(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[TILE, n + TILE] mask of which every tile's is a part: all of the first n keys, then causal.

    One for all rows: a row's plan is kept for as long as its layers may ask for it, and a mask each would fill memory.

    On a CPU as numbers to add, because a boolean mask is made into a new one at every call, which autograd then holds;
    CUDA's kernels need alignment that parts do not have, and get it when they convert a boolean one.
    """
    visible = torch.ones(TILE, n + TILE, dtype=torch.bool, device=device).tril(n)
    if device.type == "cuda":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
