"""Find the tiles of (queries, keys) that a kernel must visit for a tree: all tiles with a visible (query, key) pair."""

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


def blocks_for(width: int, dtype: torch.dtype, generation: int, extended: bool = False) -> Blocks:
    """Return block sizes for heads of at most 256 dimensions.

    With these sizes, the kernels fit in shared memory and spill no registers.

    width       padded head dimension
    generation  major compute capability of the GPU: 8 (A100), 9 (H100), 10 (B200); the sizes for 8 also suit GPUs
                with less shared memory
    extended    whether there is a window or a soft cap, which need more registers
    """
    if dtype is torch.float32:
        # Products of fp32 run on CUDA cores, and large blocks would spill thousands of registers.
        return Blocks(32, 32, 8, 2, 1) if width <= 64 else Blocks(16, 16, 4, 2, 1)
    if width > 128:
        return Blocks(32, 64 if generation == 9 else 32, 8, 2, 1)
    if generation in (9, 10):
        keys = 32 if extended and width > 64 and generation == 9 else 64
        return Blocks(128, keys, 8, 3, 2 if generation == 9 else 1)
    return Blocks(128, 32, 8, 2, 1) if width <= 64 else Blocks(64, 64, 8, 2, 1)


class TileLists(NamedTuple):
    """The blocks of keys that each block of queries visits, or the blocks of queries that each block of keys visits.

    order   [blocks]      block numbers, sorted by decreasing number of tiles, so that no long block starts last
    bounds  [blocks, 3]   indices into ``tiles``: start of the block's fully visible tiles, start of its partly visible
                          tiles, and end of its tiles
    tiles   [visits]      numbers of the visited blocks
    """

    order: Tensor
    bounds: Tensor
    tiles: Tensor


class TileMap(NamedTuple):
    """The tiles of a tree for given block sizes.

    first, stop       [n, rounded up to whole blocks] the queries first <= i < stop see the key, except for queries
                      whose window does not contain the key; no query sees a padding key
    queries_at, keys_at  [n_q] and [n], rounded up to whole blocks: positions; None if there is no window
    by_query, by_key  the same tiles, listed for each block of queries and for each block of keys
    """

    first: Tensor
    stop: Tensor
    queries_at: Tensor | None
    keys_at: Tensor | None
    by_query: TileLists
    by_key: TileLists


def tile_matrix(
    tree: Tree, blocks: Blocks, window: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute which tiles are partly or fully visible, and pad ``first`` and ``stop`` to whole blocks.

    window  as in :func:`dpo_kernels.eager.tree_attention`

    Returns  seen         [query blocks, key blocks] bool: whether any (query, key) pair of the tile is visible. With a
                          window, a few tiles that contain ends of segments can be marked although no pair is visible
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
    # A key that no query sees has first == stop, and this value can be inside a block of queries. Exclude these keys.
    furthest = np.where(first < stop, stop, 0).max(axis=1)
    # The tile has a visible pair if a key has first < high and a key has stop > low, even if these are different keys.
    # If all keys of the block have first < high, the key with stop > low satisfies both conditions. If only some keys
    # have first < high, the token of query high - 1 is in the block of keys, because `first` ascends along the row.
    # This token sees itself, so the tile has a visible pair.
    seen = (first.min(axis=1) < high) & (furthest > low)
    full = (first.max(axis=1) <= low) & (stop.min(axis=1) >= high)
    if window is not None:
        queries_at, keys_at = _block_positions(tree, blocks)
        # Ignore queries after the last query that sees a key of the block: the later queries can be on another path,
        # at smaller positions.
        last = np.clip(furthest - low, 1, blocks.queries) - 1
        nearest = np.take_along_axis(np.minimum.accumulate(queries_at, axis=1), last, axis=1)
        seen &= nearest - keys_at.max(axis=1) < window
        full &= queries_at.max(axis=1)[:, None] - keys_at.min(axis=1) < window
    return seen, full, first, stop


def _block_positions(tree: Tree, blocks: Blocks) -> list[np.ndarray]:
    """Return the positions of queries [query blocks, queries] and of keys, both padded with the last position."""
    both = (tree.positions[tree.rows], blocks.queries), (tree.positions, blocks.keys)
    return [np.pad(at, (0, -len(at) % size), "edge" if len(at) else "empty").reshape(-1, size) for at, size in both]


def tile_map(tree: Tree, blocks: Blocks, device: torch.device, window: int | None = None) -> TileMap:
    """Build the tile lists of a tree on a device; ``window`` as for :func:`tile_matrix`."""
    seen, full, first, stop = tile_matrix(tree, blocks, window)

    def lists(seen: np.ndarray, full: np.ndarray) -> list[np.ndarray]:
        whole, visits = full.sum(axis=1), seen.sum(axis=1)
        # A block's fully visible tiles come first, then its partly visible tiles. The stable sort otherwise keeps the
        # order of the row.
        ranked = np.argsort(np.where(full, 0, np.where(seen, 1, 2)), axis=1, kind="stable")
        tiles = ranked[np.arange(seen.shape[1]) < visits[:, None]]
        starts = np.cumsum(visits) - visits
        bounds = np.stack([starts, starts + whole, starts + visits], axis=1)
        return [np.argsort(-visits, kind="stable"), bounds, tiles]

    places = [] if window is None else [at.ravel() for at in _block_positions(tree, blocks)]
    arrays = [*lists(seen, full), *lists(seen.T, full.T), first.ravel(), stop.ravel(), *places]
    made = to_device([torch.from_numpy(array.astype(np.int32)) for array in arrays], device)
    return TileMap(*made[6:8], *(made[8:] or (None, None)), TileLists(*made[:3]), TileLists(*made[3:6]))
