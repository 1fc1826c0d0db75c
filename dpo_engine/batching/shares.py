"""Choose the columns of a row that each context-parallel rank processes.

Problem. Context parallelism splits the tokens of a row over `cp_size` ranks, which wait for each other in every
attention layer. All ranks should therefore have the same number of tokens, so that the MLPs do equal work and
collectives have equal shapes. All ranks should also have about the same number of visible (query, key) pairs, so that
attention does equal work. With a causal mask, a token at position i sees i + 1 keys. If each rank took contiguous
tokens, the last of many ranks would do almost twice the mean work.

Plain causal rows (layout `stacked`). Cut the row into 2 cp_size chunks; rank r takes chunks r and 2 cp_size - 1 - r.
Every rank thus has an early, cheap chunk and a late, expensive chunk, and the sum of the two costs is the same on every
rank. Megatron-Core uses this "zigzag" split. Transformer Engine and Megatron-Core's rotary embedding expect it.

Rows of trees (layout `tree`). Positions restart with every tree and every response, so the index of a column does not
determine the cost of its query. The zigzag split would be uneven: for a prompt of 2000 tokens with two responses of
8000 tokens each, the slowest of 8 ranks would do 1.57 times the mean work (measured in tests/batching/test_blocks.py).
A row of trees is therefore cut into short blocks, which are assigned according to the number of keys that their queries
see (:mod:`~dpo_engine.batching.blocks`).

Why any split is correct. Only queries are split. Attention gives each rank all keys and values that its queries see
(:mod:`dpo_engine.model.attention`), and the rest of the model processes each token separately. A split therefore
changes only the speed and the order of additions. The split is a pure function of the row, so ranks need not
communicate to agree on it.

Not covered. In each layer, the engine's attention needs memory for the keys and values of the whole row; it is not ring
attention. Attention in layers with a sliding window is not balanced. Scored tokens are not balanced, so the output
layer may have more work on some ranks. Data-parallel ranks and micro-batches are balanced elsewhere
(:mod:`~dpo_engine.batching.packing`).
"""

from __future__ import annotations

import numpy as np

from dpo_engine.batching.blocks import deal_blocks


def share_columns(length: int, cp_size: int, positions: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the columns of every context-parallel rank.

    length     number of columns in the row
    positions  [length] position of each token, for a row of trees; None for plain causal sequences

    Returns  for each rank, its columns [length / cp_size]. In a row of trees, they are in ascending order. In plain
             sequences, the columns of rank r are chunk r followed by chunk 2 cp_size - 1 - r

    Raises `ValueError` if the row cannot be split into equal parts.

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
