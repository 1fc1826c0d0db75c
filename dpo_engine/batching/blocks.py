"""Split a row of trees over context-parallel ranks: short blocks, balanced by the keys that their queries see.

Problem. :mod:`~dpo_engine.batching.shares` says what a split must achieve: the same number of tokens on every rank,
and nearly the same number of visible (query, key) pairs. In a row of trees no fixed pattern achieves that, because
positions start again with every tree and every response.

Solution. The cost of each query is known exactly: the token at position i of its own sequence sees i + 1 keys,
whatever the tree looks like. Cut the row into blocks of one length, take the visible keys of a block as its cost, and
give every rank the same number of blocks with :func:`~dpo_engine.batching.balance.deal_evenly`. Equal counts of equal
blocks give equal numbers of tokens.

Why blocks. Whole segments are too coarse: a row may hold a single pair, which has three of them. Single tokens would
balance best, but the attention kernels work on tiles of neighboring queries and skip every tile of keys that none of
these queries sees; scattered queries would leave little to skip. Blocks of `SMALLEST` to `BLOCK` tokens balance almost
as well, and :func:`padded_length` adds the few tokens of padding that a row needs to be cut into such blocks.

Every rank computes the same split from the same positions, without communication.

Not covered. Rows of at most `BLOCK` tokens per rank get one block per rank, so their attention may be uneven; such
rows are cheap. The cost counts visible keys only: it ignores tiles that are partly visible, and the output layer.
"""

from __future__ import annotations

import numpy as np

from dpo_engine.batching.balance import deal_evenly

BLOCK = 64
SMALLEST = 32


def padded_length(n: int, cp_size: int, multiple: int = 1) -> int:
    """Return the smallest row length >= `n` that `cp_size` ranks can share in equal parts.

    A rank's part is a multiple of `multiple`. If there are several ranks and the part is longer than `BLOCK`, it can be
    cut into blocks of one length from `SMALLEST` to `BLOCK`.

    multiple  number of parts that a rank's tokens are split into: the tensor-parallel size with sequence parallelism,
              else 1
    """
    share = -(-n // (cp_size * multiple)) * multiple
    while cp_size > 1 and share > BLOCK and _block_length(share) < SMALLEST:
        share += multiple
    return share * cp_size


def deal_blocks(positions: np.ndarray, cp_size: int) -> np.ndarray:
    """Return the context-parallel rank that holds each token of a row of trees.

    The block length is the largest divisor of a rank's part that is at most `BLOCK`.

    positions  [n]  position of each token in its own sequence

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
