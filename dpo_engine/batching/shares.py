"""Context parallelism: choose the columns of a row that each rank holds.

Problem. Context parallelism splits the tokens of a row over `cp_size` ranks, which wait for each other in every
attention layer. So each rank should hold the same number of tokens, for equal work in the MLPs and equal shapes in
collectives, and should see about the same number of (query, key) pairs, for equal work in attention. Under a causal
mask the token at position i sees i + 1 keys: with contiguous parts, the last of many ranks would do almost twice the
mean work.

Plain causal rows (layout `stacked`). Cut the row into 2 cp_size chunks; rank r takes chunks r and 2 cp_size - 1 - r.
An early and a late chunk together cost the same on every rank. This "zigzag" is the split of Megatron-Core, which its
rotary embedding and Transformer Engine expect.

Rows of trees (layout `tree`). Positions start again with every tree and every response, so the place of a column says
nothing about the cost of its query. Zigzag would be uneven: for a prompt of 2000 tokens with two responses of 8000,
the slowest of 8 ranks would have 1.57 times the mean (measured in tests/batching/test_blocks.py). Such a row is cut
into short blocks, which are assigned by the keys that their queries see (:mod:`~dpo_engine.batching.blocks`).

Why any split is correct. Only queries are split. Attention gathers the keys and values of the whole row on each rank
(:mod:`dpo_engine.model.attention`), and the rest of the model treats each token by itself. A split therefore changes
speed and the order of summation, but nothing else. Ranks need not communicate it, since it is a pure function.

Not covered. Gathered keys and values need memory for the whole row in each attention layer; there is no ring
attention. Scored tokens are not balanced, so the output layer may have more work on some ranks. Data-parallel ranks
and micro-batches are balanced elsewhere (:mod:`~dpo_engine.batching.packing`).
"""

from __future__ import annotations

import numpy as np

from dpo_engine.batching.blocks import deal_blocks


def share_columns(length: int, cp_size: int, positions: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the columns of every context-parallel rank.

    length     number of columns of the row
    positions  [length] position of each token of a row of trees; None for plain causal sequences

    Returns  [length / cp_size] each: ascending for trees; for plain sequences chunk r, then chunk 2 cp_size - 1 - r

    Raises `ValueError` if the row cannot be split into the equal parts that this needs.

    Source: for plain sequences, Megatron-Core's `get_batch_on_this_cp_rank`.
    """
    if positions is not None:
        owner = deal_blocks(positions, cp_size)
        return [np.flatnonzero(owner == rank) for rank in range(cp_size)]
    if length % (2 * cp_size):
        raise ValueError(
            f"{length} columns cannot be split into {2 * cp_size} equal chunks for {cp_size} context-parallel ranks"
        )
    chunks = np.split(np.arange(length), 2 * cp_size)
    return [np.concatenate([chunks[rank], chunks[2 * cp_size - 1 - rank]]) for rank in range(cp_size)]
