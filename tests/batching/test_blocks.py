"""Tests of distributing the blocks of a row over context-parallel ranks.

All ranks must get the same number of tokens, and nearly the same attention work. A row consists of trees. A tree is a
prompt followed by its responses, which do not see each other. For such rows, the usual zigzag distribution does not
balance the work.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.batching.blocks import deal_blocks, padded_length

SHAPES = [(2000, 8000, 8000), (4000, 12000, 2000), (16000, 2000, 3000), (8000, 8000, 500)]


def row(*trees, n=0):
    """Return the token positions of a row of trees, padded with zeros to length n.

    Each tree is a tuple of lengths (prompt, response, ...).
    """
    places = []
    for prompt, *responses in trees:
        places += range(prompt)
        for response in responses:
            places += range(prompt, prompt + response)
    return np.array(places + [0] * (n - len(places)))


def attention(positions, owner, cp_size):
    """Return the number of visible (query, key) pairs of each rank."""
    return np.array([sum(p + 1 for p in positions[owner == rank].tolist()) for rank in range(cp_size)])


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiple", [1, 8])
def test_one_long_pair_is_balanced(shape, cp_size, multiple):
    n = padded_length(sum(shape), cp_size, multiple)
    assert n / sum(shape) <= 1.005
    positions = row(shape, n=n)
    owner = deal_blocks(positions, cp_size)
    assert set(np.bincount(owner, minlength=cp_size)) == {n // cp_size}
    keys = attention(positions, owner, cp_size)
    assert keys.max() / keys.mean() <= 1.001


def test_zigzag_would_be_unbalanced():
    """Check that the zigzag distribution is uneven. This is why blocks are distributed by their attention work."""
    positions = row((2000, 8000, 8000))
    chunk = np.arange(18000) * 16 // 18000
    keys = attention(positions, np.minimum(chunk, 15 - chunk), 8)
    assert keys.max() / keys.mean() == pytest.approx(1.57, abs=0.01)


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_row_of_many_trees_is_balanced(cp_size):
    sizes = np.random.default_rng(0).integers(20, 400, size=(20, 4)).tolist()
    n = padded_length(sum(map(sum, sizes)), cp_size, 8)
    positions = row(*sizes, n=n)
    keys = attention(positions, deal_blocks(positions, cp_size), cp_size)
    assert keys.max() / keys.mean() <= 1.015
    assert n <= 1.01 * sum(map(sum, sizes))


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), cp_size=st.sampled_from([1, 2, 3, 4, 8]), multiple=st.sampled_from([1, 2, 8]))
def test_padding_and_blocks_for_any_length(n, cp_size, multiple):
    padded = padded_length(n, cp_size, multiple)
    assert padded >= n and padded % (cp_size * multiple) == 0
    assert padded_length(padded, cp_size, multiple) == padded
    least = -(-n // (cp_size * multiple)) * cp_size * multiple
    assert padded - least <= (0 if cp_size == 1 or least <= 64 * cp_size else 24 * cp_size)
    owner = deal_blocks(np.arange(padded), cp_size)
    assert np.bincount(owner).tolist() == [padded // cp_size] * cp_size
    assert (owner == deal_blocks(np.arange(padded), cp_size)).all()
    # All blocks have the same length, which is from 32 to 64 tokens if a rank has more than 64 tokens.
    share = padded // cp_size
    if cp_size > 1 and share > 64:
        assert any(
            share % length == 0 and (owner.reshape(-1, length) == owner.reshape(-1, length)[:, :1]).all()
            for length in range(32, 65)
        )


def test_by_hand():
    # On one rank, only the multiple matters. If two ranks share 129 tokens, each rank must have at least 65 tokens. A
    # block has 32 to 64 tokens. Equal blocks are not possible for 65 tokens, but are possible for 66 tokens.
    assert [padded_length(n, 1, 4) for n in (1, 4, 5)] == [4, 4, 8]
    assert [padded_length(n, 2) for n in (1, 128, 129)] == [2, 128, 132]
    # Each of the four blocks has 33 tokens, and the attention work increases from block to block. One rank gets the
    # first and the last block, and the other rank gets the two blocks in the middle.
    assert deal_blocks(np.arange(132), 2).tolist() == [0] * 33 + [1] * 66 + [0] * 33


def test_unpadded_row_is_refused():
    says = "129 tokens cannot be split into equal blocks for 2 .* ranks; pad them to 132"
    with pytest.raises(ValueError, match=says):
        deal_blocks(np.arange(129), 2)
