"""Which tiles of (queries, keys) a kernel visits for a tree: all that have anything visible, and no others."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.tree import Tree


class Blocks(NamedTuple):
    """Neighbouring queries and keys of one tile, and how the compiler shares a tile among threads and time.

    ``stages`` tiles are on their way at once in the passes over queries, ``key_stages`` in the pass over keys, which
    holds more.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    key_stages: int


class TileLists(NamedTuple):
    """For each block of one side, which blocks of the other it visits.

    order   [blocks]      blocks with the most tiles first, so that no long one starts last
    bounds  [blocks, 3]   where in ``tiles`` a block's fully visible tiles start, its partly visible ones start, and end
    tiles   [visits]      numbers of blocks of the other side
    """

    order: Tensor
    bounds: Tensor
    tiles: Tensor


class TileMap(NamedTuple):
    """The tiles of a tree under one choice of block sizes.

    first, stop  [n, rounded up to whole blocks]  the queries first <= i < stop see the key; none behind the row's end
    by_query, by_key  the same tiles, listed for either side
    """

    first: Tensor
    stop: Tensor
    by_query: TileLists
    by_key: TileLists


def tile_matrix(tree: Tree, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which tiles have anything visible and which everything, exactly, and ``first`` and ``stop`` of whole blocks.

    Returns  seen, full [query blocks, key blocks] bool, first, stop [key blocks, keys]
    """
    key_blocks = -(-tree.n // blocks.keys)
    behind = (0, key_blocks * blocks.keys - tree.n)
    n_q = len(tree.rows)
    first = np.pad(tree.first, behind, constant_values=n_q).reshape(key_blocks, blocks.keys)
    stop = np.pad(tree.stop, behind).reshape(key_blocks, blocks.keys)
    low = np.arange(0, n_q, blocks.queries)[:, None]
    high = np.minimum(low + blocks.queries, n_q)
    # A key that no query sees has first == stop, which may lie within a block of queries: it must not count.
    furthest = np.where(first < stop, stop, 0).max(axis=1)
    # first ascends along the row. Where only some keys of a block start before `high`, query high - 1 is itself one of
    # the block's tokens and sees itself, so that the two conditions may be met by different keys.
    seen = (first.min(axis=1) < high) & (furthest > low)
    full = (first.max(axis=1) <= low) & (stop.min(axis=1) >= high)
    return seen, full, first, stop


def tile_map(tree: Tree, blocks: Blocks, device: torch.device) -> TileMap:
    """The tile lists of a tree on a device."""
    seen, full, first, stop = tile_matrix(tree, blocks)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    def lists(seen: np.ndarray, full: np.ndarray) -> TileLists:
        whole, visits = full.sum(axis=1), seen.sum(axis=1)
        # Sorting puts a block's full tiles first and keeps the order of the row among equals.
        ranked = np.argsort(np.where(full, 0, np.where(seen, 1, 2)), axis=1, kind="stable")
        tiles = ranked[np.arange(seen.shape[1]) < visits[:, None]]
        starts = np.cumsum(visits) - visits
        bounds = np.stack([starts, starts + whole, starts + visits], axis=1)
        return TileLists(tensor(np.argsort(-visits, kind="stable")), tensor(bounds), tensor(tiles))

    return TileMap(tensor(first.ravel()), tensor(stop.ravel()), lists(seen, full), lists(seen.T, full.T))
