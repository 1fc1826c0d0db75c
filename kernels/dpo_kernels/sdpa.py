"""Tree attention with torch's scaled_dot_product_attention, on any device.

The work is nearly proportional to the visible area: the number of (query, key) pairs in which the query sees the key.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import eager
from dpo_kernels.tile_attention import tile_attention
from dpo_kernels.transfer import to_device
from dpo_kernels.tree import Tree

TILE = 128
"""Maximum number of queries in one masked call. In a full tile, the mask hides about TILE / 2 scores per query. With a
window, it hides TILE - 1 scores per query."""

SHORT = 64
"""Maximum number of tokens in a group of neighboring trees that share one call. A call per tree would be slower."""


class Chain(NamedTuple):
    """A path of segments, in which each segment after the first one is the first child of the previous segment.

    The tokens of a chain are contiguous in the row. The first segment of a chain is a root or a child that is not a
    first child.

    prefix       the tokens of the chain's ancestors. A pair (p, t) means the first t tokens of the part with index p in
                 the result of :func:`parts`. This part comes before the chain
    start, stop  the range of the chain's tokens
    runs         contiguous runs of queries: (index in ``tree.rows`` of the first query, its token, number of queries)
    """

    prefix: tuple[tuple[int, int], ...]
    start: int
    stop: int
    runs: tuple[tuple[int, int, int], ...]


class Together(NamedTuple):
    """A group of neighboring whole trees that have at most `SHORT` tokens in total.

    start, stop  the range of the group's tokens
    low, high    the range of the group's queries, as indices into ``tree.rows``
    """

    start: int
    stop: int
    low: int
    high: int


def parts(tree: Tree) -> list[Chain | Together]:
    """Split a row into parts that are computed one after another: groups of short trees, and chains of longer trees."""
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
    """Split the tree of segments ``first`` to ``last - 1`` into chains. ``before``: the parts in front of the tree."""
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
    """Like :func:`dpo_kernels.eager.tree_attention`.

    A group of short trees is computed by one call with a mask. In other trees, a run of queries that starts at the
    root, and is not longer than the window, is computed by one causal call. Every other run is split into tiles, and
    each tile is computed by one masked call. Without a window, this call covers all keys that the tile's last query
    sees, and the mask is causal for the tile's own tokens. With a window, the keys start at the first key that the
    tile's first query sees. torch's ``causal_lower_right`` could compute a whole run in one call, but on a CPU it also
    computes and stores the invisible half.

    torch's operator supports neither soft caps nor sinks. If there is a soft cap or a sink, every run is split into
    tiles, and all calls go to :func:`~dpo_kernels.tile_attention.tile_attention` instead.
    """
    if not len(tree.rows):
        # The result is empty, but must be part of the autograd graph.
        return eager.tree_attention(query, key, value, tree, scale, window=window, softcap=softcap, sinks=sinks)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = tree.effective(window)
    value_width = value.shape[-1]
    own = softcap is not None or sinks is not None
    width = max(query.shape[-1], value_width)
    # Fused kernels need equal head dimensions for keys and values. Padding with zeros does not change the result.
    q, k, v = (
        tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))
        for tensor in (query, key, value)
    )

    def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if own:
            return tile_attention(queries, keys, values, mask, scale, softcap, sinks)
        found = F.scaled_dot_product_attention(
            *(_heads_first(tensor) for tensor in (queries, keys, values)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return found[0].transpose(0, 1)

    plan = tree.prepared("parts", lambda: parts(tree))
    widest = 1 << (tree.n - 1).bit_length()  # rounded up to a power of 2, so that a few masks serve all row lengths
    corner = _corner(widest, q.device, q.dtype)
    band = None if window is None else _band(window, q.device, q.dtype)
    short = window if window is not None and window < SHORT else None  # larger windows hide nothing in short trees
    sizes = [part.stop - part.start for part in plan]
    key_parts, value_parts = k.split(sizes), v.split(sizes)
    visible = tree.prepared(("visible", q.device, short), lambda: _visible(tree, plan, q.device, short))
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
            before = ancestors + token - part.start  # number of tokens on the path before the run's first query
            banded = window is not None and before + count > window
            whole = not (before or banded or own)
            size = count if whole else TILE
            for offset in range(0, count, size):
                many, reach = min(size, count - offset), before + offset
                low = max(0, reach + 1 - window) if banded else 0  # the first key that the first query sees
                if banded:
                    mask = band[:many, window - 1 - (reach - low) : window - 1 + many]
                else:
                    mask = None if whole else corner[:many, widest - reach : widest + many]
                queries = q[index + offset : index + offset + many]
                outputs.append(attend(queries, keys[low : reach + many], values[low : reach + many], mask))
    return torch.cat(outputs)[..., :value_width]


def _visible(tree: Tree, plan: list[Chain | Together], device: torch.device, window: int | None) -> dict[int, Tensor]:
    """Return the masks [queries, tokens] of all groups of short trees, keyed by part number. All layers share them."""
    masks = {}
    for number, part in enumerate(plan):
        if isinstance(part, Together):
            first, stop = (ends[part.start : part.stop] for ends in (tree.first, tree.stop))
            index = np.arange(part.low, part.high)[:, None]
            seen = (first <= index) & (index < stop)
            if window is not None:
                queries_at = tree.positions[tree.rows[part.low : part.high]]
                seen &= queries_at[:, None] - tree.positions[part.start : part.stop] < window
            masks[number] = torch.from_numpy(seen)
    return dict(zip(masks, to_device(list(masks.values()), device), strict=True))


def _heads_first(tensor: Tensor) -> Tensor:
    """View [n, heads, d] as [1, heads, n, d]. Elsewhere, tokens are the first dimension, so that slicing is cheap."""
    return tensor.transpose(0, 1)[None]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=8)
def _corner(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a mask [TILE, n + TILE] that contains the mask of every tile as a slice.

    In the first n columns, all keys are visible; the other columns are causal. This one mask serves all rows of at most
    n tokens. If each row had a mask of its own, the mask would stay in memory as long as the row's :class:`Tree`.

    On a CPU, the mask is additive, because torch would convert a boolean mask at every call, and autograd would keep
    the copy. On CUDA, the mask is boolean. The kernels require an alignment that slices do not have, and torch's
    conversion of a boolean mask provides it.
    """
    return _mask(torch.ones(TILE, n + TILE, dtype=torch.bool, device=device).tril(n), dtype)


@lru_cache(maxsize=8)
def _band(window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a mask [TILE, window - 1 + TILE] that contains the mask of every tile as a slice.

    Row i is for the tile's i-th query. The first column is for the key that is ``window - 1`` positions before the
    tile's first query.
    """
    visible = torch.ones(TILE, window - 1 + TILE, dtype=torch.bool, device=device)
    return _mask(visible.tril(window - 1).triu(), dtype)


def _mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    if visible.device.type == "cuda":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
