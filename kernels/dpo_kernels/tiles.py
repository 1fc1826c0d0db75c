"""Find the tiles of (queries, keys) that a kernel must visit for a tree: those with a visible (query, key) pair."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.transfer import to_device
from dpo_kernels.tree import Tree


class Blocks(NamedTuple):
    """The size of a tile in queries and keys, and the number of warps and of software pipeline stages of the kernels.

    ``stages`` applies to the two kernels that loop over keys. ``key_stages`` applies to the kernel that loops over
    queries, which needs more shared memory.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    key_stages: int


class TileLists(NamedTuple):
    """For each block of queries, the blocks of keys that it visits; or for each block of keys, the blocks of queries.

    order   [blocks]      block numbers, sorted by decreasing number of tiles, so that no long block starts last
    bounds  [blocks, 3]   indices into ``tiles``: start of the block's fully visible tiles, start of its partly visible
                          tiles, and end
    tiles   [visits]      numbers of the visited blocks
    """

    order: Tensor
    bounds: Tensor
    tiles: Tensor


class TileMap(NamedTuple):
    """The tiles of a tree for given block sizes.

    first, stop       [n, rounded up to whole blocks] the key is visible to the queries first <= i < stop; padding keys
                      are not visible to any query
    by_query, by_key  the same tiles, listed for each block of queries and for each block of keys
    """

    first: Tensor
    stop: Tensor
    by_query: TileLists
    by_key: TileLists


def tile_matrix(tree: Tree, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute which tiles are partly or fully visible, and pad ``first`` and ``stop`` to whole blocks.

    Returns  seen         [query blocks, key blocks] bool: whether any (query, key) pair of the tile is visible
             full         [query blocks, key blocks] bool: whether all pairs of the tile are visible
             first, stop  [key blocks, keys]
    """
    key_blocks = -(-tree.n // blocks.keys)
    behind = (0, key_blocks * blocks.keys - tree.n)
    n_q = len(tree.rows)
    first = np.pad(tree.first, behind, constant_values=n_q).reshape(key_blocks, blocks.keys)
    stop = np.pad(tree.stop, behind).reshape(key_blocks, blocks.keys)
    low = np.arange(0, n_q, blocks.queries)[:, None]
    high = np.minimum(low + blocks.queries, n_q)
    # A key that no query sees has first == stop, and this value may be inside a block of queries. Exclude such keys.
    furthest = np.where(first < stop, stop, 0).max(axis=1)
    # The tile is visible even if different keys satisfy the two conditions, because `first` ascends along the row: if
    # only some keys of a block have first < high, then query high - 1 is itself a token of the block and sees itself.
    seen = (first.min(axis=1) < high) & (furthest > low)
    full = (first.max(axis=1) <= low) & (stop.min(axis=1) >= high)
    return seen, full, first, stop


def tile_map(tree: Tree, blocks: Blocks, device: torch.device) -> TileMap:
    """Build the tile lists of a tree on a device."""
    seen, full, first, stop = tile_matrix(tree, blocks)

    def lists(seen: np.ndarray, full: np.ndarray) -> list[np.ndarray]:
        whole, visits = full.sum(axis=1), seen.sum(axis=1)
        # The stable sort puts a block's fully visible tiles first and otherwise keeps the order of the row.
        ranked = np.argsort(np.where(full, 0, np.where(seen, 1, 2)), axis=1, kind="stable")
        tiles = ranked[np.arange(seen.shape[1]) < visits[:, None]]
        starts = np.cumsum(visits) - visits
        bounds = np.stack([starts, starts + whole, starts + visits], axis=1)
        return [np.argsort(-visits, kind="stable"), bounds, tiles]

    arrays = [first.ravel(), stop.ravel(), *lists(seen, full), *lists(seen.T, full.T)]
    first, stop, *rest = to_device([torch.from_numpy(array.astype(np.int32)) for array in arrays], device)
    return TileMap(first, stop, TileLists(*rest[:3]), TileLists(*rest[3:]))
