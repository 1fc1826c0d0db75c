"""Which columns of a row each context-parallel rank holds: equal in number, and nearly equal in attention."""

from __future__ import annotations

import numpy as np

BLOCK = 64
"""Columns that are dealt together, at most: fewer balance better, more make longer runs for the kernels."""


def padded_length(length: int, cp_size: int, multiple: int = 1) -> int:
    """The least number of columns, from `length` on, that can be dealt as a tree's.

    multiple   each rank's part is divisible by this (tensor-parallel ranks that split it further)
    """
    if cp_size == 1:
        return -(-length // multiple) * multiple
    blocks = _blocks(length, cp_size)
    size = -(-length // blocks)
    return blocks * (-(-size // multiple) * multiple)


def _blocks(length: int, cp_size: int) -> int:
    return cp_size * -(-length // (BLOCK * cp_size))


def share_columns(length: int, cp_size: int, positions: np.ndarray | None = None) -> list[np.ndarray]:
    """The columns of every context-parallel rank, ascending.

    length      of the row, as :func:`padded_length` gives it for a tree, a multiple of `2 cp_size` otherwise
    positions   [length] of a tree's tokens, or None for plain sequences, which are cut into chunks `r` and
                `2 cp_size - 1 - r`

    Raises `ValueError` when the columns are not the equal parts that are dealt.
    """
    if positions is None:
        if length % (2 * cp_size):
            raise ValueError(
                f"{length} columns are not {2 * cp_size} equal chunks for {cp_size} context-parallel ranks"
            )
        chunks = np.split(np.arange(length), 2 * cp_size)
        return [np.concatenate([chunks[rank], chunks[2 * cp_size - 1 - rank]]) for rank in range(cp_size)]
    blocks = _blocks(length, cp_size)
    if length % blocks:
        raise ValueError(f"{length} columns are not {blocks} equal blocks for {cp_size} context-parallel ranks")
    size = length // blocks
    weights = (positions + 1).reshape(blocks, size).sum(axis=1)
    places = np.empty(blocks, dtype=np.int64)
    places[np.argsort(-weights, kind="stable")] = np.arange(blocks)
    turn, place = np.divmod(places, cp_size)
    owner = np.where(turn % 2 == 0, place, cp_size - 1 - place)
    return [np.flatnonzero(np.repeat(owner == rank, size)) for rank in range(cp_size)]
