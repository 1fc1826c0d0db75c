"""Which tokens of a packed row each context-parallel rank holds: blocks, dealt by how many keys their queries see."""

from __future__ import annotations

import numpy as np

from dpo_engine.batching.balance import deal_evenly

BLOCK = 64
SMALLEST = 32


def padded_length(n: int, cp_size: int, multiple: int = 1) -> int:
    """The least length, `n` or more, of a row that `cp_size` ranks share in equal parts.

    A rank's part is a multiple of `multiple`, and several blocks of one length if it is longer than a block.

    multiple  parts that a rank's tokens are cut into: tensor-parallel ranks, under sequence parallelism
    """
    share = -(-n // (cp_size * multiple)) * multiple
    while cp_size > 1 and share > BLOCK and _block_length(share) < SMALLEST:
        share += multiple
    return share * cp_size


def deal_blocks(positions: np.ndarray, cp_size: int) -> np.ndarray:
    """The context-parallel rank that holds each token of a packed row, as a query.

    The row is cut into blocks of one length, the greatest up to `BLOCK` tokens that divides a rank's part. All ranks
    get the same number of blocks, hence of tokens, and visible keys as equal as blocks allow: a token at position i
    sees i + 1 keys, whatever the tree. The keys and values themselves are gathered, so any deal is right.

    positions  [n]  place of each token in its own sequence

    Returns  [n] int64

    Raises `ValueError` when n is not what :func:`padded_length` gives.
    """
    n = len(positions)
    if n != padded_length(n, cp_size):
        raise ValueError(
            f"{n} tokens are not equal blocks for {cp_size} context-parallel ranks; pad them to "
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
