"""Tree attention with torch's scaled_dot_product_attention, on any device; work is proportional to the visible area."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import eager
from dpo_kernels.tree import Tree

TILE = 128
"""Number of queries of one masked call. On average, each query computes half as many scores in vain."""

SHORT = 64
"""Neighboring trees with at most this many tokens share one call, because separate calls would cost more."""


class Chain(NamedTuple):
    """A segment that is not a first child, its first child, the first child of that, and so on; contiguous in the row.

    prefix       the tokens of its ancestors, as (number of a part, number of tokens from the start of that part)
    start, stop  the range of its tokens
    runs         contiguous runs of its queries: (index of the first one in ``tree.rows``, its token, number of queries)
    """

    prefix: tuple[tuple[int, int], ...]
    start: int
    stop: int
    runs: tuple[tuple[int, int, int], ...]


class Together(NamedTuple):
    """Neighboring whole trees with at most `SHORT` tokens together.

    start, stop  the range of their tokens
    low, high    the range of their queries, as indices into ``tree.rows``
    """

    start: int
    stop: int
    low: int
    high: int


def parts(tree: Tree) -> list[Chain | Together]:
    """Split a row into the parts that are computed in turn: groups of short trees, and the chains of other trees."""
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
    """Split the tree of segments ``first`` to ``last`` into chains; their numbers continue those of ``before``."""
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
    """Like :func:`dpo_kernels.eager.tree_attention`.

    A group of short trees takes one call with a mask. In other trees, a run of queries that starts at the root takes
    one causal call. Every other run is cut into tiles. A tile takes one call over all keys that its last query sees,
    with a mask for the triangle of the tile's own tokens. ``causal_lower_right`` could do a whole run in one call, but
    on a CPU it computes and stores the invisible half as well.
    """
    if not len(tree.rows):
        return eager.tree_attention(query, key, value, tree, scale)  # empty, but part of the autograd graph
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    value_width = value.shape[-1]
    width = max(query.shape[-1], value_width)
    # Fused kernels need equal head dimensions for keys and values. Padding with zeros does not change the result.
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
    widest = 1 << (tree.n - 1).bit_length()  # rounded to a power of 2, so that few masks serve all row lengths
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
            before = ancestors + token - part.start  # number of keys that the run's first query sees besides itself
            size = TILE if before else count
            for offset in range(0, count, size):
                many, reach = min(size, count - offset), before + offset
                mask = corner[:many, widest - reach : widest + many] if before else None
                queries = q[index + offset : index + offset + many]
                outputs.append(attend(queries, keys[: reach + many], values[: reach + many], mask))
    return torch.cat(outputs)[..., :value_width]


def _visible(tree: Tree, plan: list[Chain | Together], device: torch.device) -> dict[int, Tensor]:
    """Masks [queries, tokens] of the groups of short trees, by the number of the part; all layers share them."""
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
    """View [n, heads, d] as [1, heads, n, d]. Tokens come first elsewhere because that makes slicing cheap."""
    return tensor.transpose(0, 1)[None]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=8)
def _corner(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask [TILE, n + TILE] that contains every tile's mask as a slice: the first n keys are visible, then causal.

    One mask serves all rows. A mask per row would be kept with the row's plan and fill the memory.

    On a CPU the mask is additive, because torch converts a boolean mask at every call and autograd keeps the copy. On
    CUDA it is boolean: kernels need an alignment that slices do not have, and the conversion provides it.
    """
    visible = torch.ones(TILE, n + TILE, dtype=torch.bool, device=device).tril(n)
    if device.type == "cuda":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
