"""Cut a row of trees into short blocks, and balance their attention costs over context-parallel ranks.

Problem. As :mod:`~dpo_engine.batching.shares` explains, a split must give every rank the same number of tokens and
nearly the same number of visible (query, key) pairs. A row of trees contains several prompts, each followed by its
responses (:mod:`~dpo_engine.batching.trees`). In such a row, no fixed pattern achieves an even split, because positions
restart with every tree and every response.

Solution. The cost of each query is known exactly: a token at position i of its sequence sees i + 1 keys, whatever the
shape of the tree. Cut the row into blocks of equal length. The cost of a block is the number of keys that its queries
see. :func:`~dpo_engine.batching.balance.deal_evenly` gives every rank the same number of blocks, with nearly even
total costs. All blocks have the same length, so all ranks get the same number of tokens.

Why blocks. Whole segments are too coarse: a row may contain a single pair, which has only three segments. Single tokens
would balance best, but the attention kernels process tiles of adjacent queries and skip a tile of keys only if none of
these queries sees it. With scattered queries, the kernels could skip very few tiles. Blocks of `SMALLEST` to `BLOCK`
tokens balance almost as well as single tokens. :func:`padded_length` adds the few padding tokens that a row needs for
such blocks.

Every rank computes the same split from the same positions, without communication.

Not covered. In rows of at most `BLOCK` tokens per rank, every rank gets one block, so the attention cost may be uneven.
Such rows are cheap. The cost of a block counts only visible keys. It includes neither the extra work for partly visible
tiles nor the work of the output layer, and it ignores sliding windows.
"""

from __future__ import annotations

import numpy as np

from dpo_engine.batching.balance import deal_evenly

BLOCK = 64
SMALLEST = 32


def padded_length(n: int, cp_size: int, multiple: int = 1) -> int:
    """Return the smallest row length >= `n` that `cp_size` ranks can share in equal parts.

    The length of each rank's part is a multiple of `multiple`. If there are several ranks and the part is longer than
    `BLOCK`, the part can be cut into blocks of equal length, from `SMALLEST` to `BLOCK` tokens.

    multiple  from :meth:`~dpo_engine.platform.dims.ParallelDims.share_multiple`: with sequence parallelism, a multiple
              of the tensor-parallel size; with FP8, a multiple of the number that FP8 requires; otherwise 1
    """
    share = -(-n // (cp_size * multiple)) * multiple
    while cp_size > 1 and share > BLOCK and _block_length(share) < SMALLEST:
        share += multiple
    return share * cp_size


def deal_blocks(positions: np.ndarray, cp_size: int) -> np.ndarray:
    """Return the context-parallel rank to which each token in a row of trees is assigned.

    The length of a block is the largest divisor of n / `cp_size` that is at most `BLOCK`.

    positions  [n]  position of each token in its sequence

    Returns  [n] int64

    Raises `ValueError` if n is not a length that :func:`padded_length` returns.
    """
    n = len(positions)
    if n != padded_length(n, cp_size):
        raise ValueError(
            f"{n} tokens cannot be split into equal blocks for {cp_size} context-parallel ranks; pad them to "
            f"{padded_length(n, cp_size)}"
        )
    if cp_size == 1:
        return np.zeros(n, dtype=np.int64)
    share = n // cp_size
    length = _block_length(share)
    visible = (np.asarray(positions, dtype=np.int64) + 1).reshape(-1, length).sum(1)
    owner = deal_evenly(visible, cp_size, sizes=np.ones_like(visible), capacity=share // length)
    return np.repeat(owner, length)


def _block_length(share: int) -> int:
    return next(length for length in range(min(BLOCK, share), 0, -1) if share % length == 0)
