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


class Chain(NamedTuple):
    """A segment that continues no other, its first child, that one's first child, ...: neighbours in the row.

    prefix  what its ancestors are made of: (number of a chain, how many of that chain's tokens)
    start, stop  its tokens
    runs    its queries as runs without gaps: (index of the first in ``tree.rows``, its token, how many)
    """

    prefix: tuple[tuple[int, int], ...]
    start: int
    stop: int
    runs: tuple[tuple[int, int, int], ...]


def chains(tree: Tree) -> list[Chain]:
    """The chains of a tree, in the order of the row."""
    heads = [s for s, parent in enumerate(tree.parents.tolist()) if parent == -1 or parent != s - 1]
    chain_of = np.repeat(np.arange(len(heads)), np.diff([*heads, len(tree.parents)]))
    found: list[Chain] = []
    ends = [*tree.starts[heads[1:]].tolist(), tree.n]
    for head, stop in zip(heads, ends, strict=True):
        start, parent = int(tree.starts[head]), int(tree.parents[head])
        prefix: tuple[tuple[int, int], ...] = ()
        if parent >= 0:
            above = found[chain_of[parent]]
            fork = int(tree.starts[parent] + tree.lengths[parent])
            prefix = (*above.prefix, (int(chain_of[parent]), fork - above.start))
        low, high = np.searchsorted(tree.rows, [start, stop])
        rows = tree.rows[low:high]
        firsts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        counts = np.diff(firsts, append=len(rows))
        runs = tuple((int(low + i), int(rows[i]), int(count)) for i, count in zip(firsts, counts, strict=True))
        found.append(Chain(prefix, start, stop, runs))
    return found


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float | None = None) -> Tensor:
    """As :func:`dpo_kernels.eager.tree_attention`.

    A run of queries that starts with its root is one causal call. Others are cut into tiles, each one call over all
    that its last query sees, with a mask for the tile's own corner; ``causal_lower_right`` would do the whole run
    in one call, but on a CPU computes and holds the invisible half as well.
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
    plan = tree.prepared("chains", lambda: chains(tree))
    widest = 1 << (tree.n - 1).bit_length()  # few masks do for rows of any length
    corner = _corner(widest, q.device, q.dtype)
    sizes = [chain.stop - chain.start for chain in plan]
    key_parts, value_parts = k.split(sizes), v.split(sizes)
    outputs = []
    for number, chain in enumerate(plan):
        if not chain.runs:
            continue
        _, token, count = chain.runs[-1]
        path = [*chain.prefix, (number, token + count - chain.start)]
        keys, values = (_joined([parts[part][:many] for part, many in path]) for parts in (key_parts, value_parts))
        ancestors = sum(many for _, many in chain.prefix)
        for index, token, count in chain.runs:
            before = ancestors + token - chain.start  # what the run's first query sees besides itself
            size = TILE if before else count
            for offset in range(0, count, size):
                many, reach = min(size, count - offset), before + offset
                seen = reach + many
                found = F.scaled_dot_product_attention(
                    _heads_first(q[index + offset : index + offset + many]),
                    _heads_first(keys[:seen]),
                    _heads_first(values[:seen]),
                    attn_mask=corner[:many, widest - reach : widest + many] if before else None,
                    is_causal=not before,
                    scale=scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
                outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)[..., :value_width]


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
