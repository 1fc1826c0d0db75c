"""Which columns of a row each context-parallel rank holds: equal in number, and nearly equal in attention."""

from __future__ import annotations

import numpy as np

from dpo_engine.batching.blocks import deal_blocks


def share_columns(length: int, cp_size: int, positions: np.ndarray | None = None) -> list[np.ndarray]:
    """The columns of every context-parallel rank.

    length      of the row
    positions   [length] of a tree's tokens, dealt by :func:`~dpo_engine.batching.blocks.deal_blocks`, ascending; None
                for plain sequences, of which rank r holds chunks `r` and `2 cp_size - 1 - r`: an early and a late one
                together cost every rank the same under causal attention

    Raises `ValueError` when the columns are not the equal parts that are dealt.

    Source: for plain sequences, Megatron-Core's `get_batch_on_this_cp_rank`, which its rotary embedding and Transformer
    Engine expect.
    """
    if positions is not None:
        owner = deal_blocks(positions, cp_size)
        return [np.flatnonzero(owner == rank) for rank in range(cp_size)]
    if length % (2 * cp_size):
        raise ValueError(f"{length} columns are not {2 * cp_size} equal chunks for {cp_size} context-parallel ranks")
    chunks = np.split(np.arange(length), 2 * cp_size)
    return [np.concatenate([chunks[rank], chunks[2 * cp_size - 1 - rank]]) for rank in range(cp_size)]
