"""Micro-batches: rows by hand, dummies, padding, and the columns of context-parallel ranks as Megatron takes them."""

import doctest
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import RandomPairs
from ranks import run_ranks

from dpo_engine.data import batches
from dpo_engine.data.batches import collate

PAIRS = RandomPairs(12, 50)


def batch_of(places, **settings):
    settings = {"pad_id": 0, **settings}
    return collate([None if place < 0 else PAIRS[place] for place in places], places, **settings)


class TestCollate:
    def test_the_example_of_its_docstring(self):
        result = doctest.testmod(batches)
        assert result.attempted >= 8 and result.failed == 0

    @given(
        places=st.lists(st.integers(-1, 11), min_size=1, max_size=5),
        multiple=st.integers(1, 9),
        length=st.none() | st.integers(1, 40),
    )
    def test_rows(self, places, multiple, length):
        batch = batch_of(places, multiple=multiple, length=length, pad_id=99)
        rows = [None if p < 0 else [*PAIRS[p].prompt, *PAIRS[p].chosen] for p in places]
        rows += [None if p < 0 else [*PAIRS[p].prompt, *PAIRS[p].rejected] for p in places]
        longest = max([2 if row is None else len(row) for row in rows] + [length or 0])
        assert batch.tokens.shape == batch.labels.shape == (len(rows), -(-longest // multiple) * multiple)
        assert batch.tokens.shape[1] % multiple == 0 and batch.tokens.shape[1] - longest < multiple
        for number, row in enumerate(rows):
            expected = [] if row is None else row
            assert batch.tokens[number].tolist() == expected + [99] * (batch.tokens.shape[1] - len(expected))
            # Independent of the collation: a label is the next token, where that lies behind the prompt.
            behind = 10**9 if row is None else len(PAIRS[places[number % len(places)]].prompt)
            for column, label in enumerate(batch.labels[number].tolist()):
                scored = behind <= column + 1 < len(expected)
                assert label == (expected[column + 1] if scored else -100)

    def test_facts(self):
        batch = batch_of([3, -1, 5])
        assert batch.index.tolist() == [3, -1, 5] and batch.num_pairs == 2
        assert batch.weights.tolist() == [PAIRS[3].weight, 0.0, PAIRS[5].weight]
        assert torch.isnan(batch.margins).tolist() == [True, False, True]
        kinds = [tensor.dtype for tensor in (batch.tokens, batch.labels, batch.positions, batch.index)]
        assert set(kinds) == {torch.int64} and batch.weights.dtype == batch.margins.dtype == torch.float32
        assert batch.positions.tolist() == list(range(batch.tokens.shape[1]))

    def test_only_dummies(self):
        batch = batch_of([-1, -1], multiple=4)
        assert batch.tokens.shape == (4, 4) and (batch.labels == -100).all() and batch.weights.sum() == 0


def megatrons_share(whole):
    """This rank's columns by Megatron's own function."""
    from megatron.core.utils import get_batch_on_this_cp_rank
    from torch import distributed as dist

    given = {"tokens": whole.tokens, "labels": whole.labels, "positions": whole.positions[None]}
    # Megatron 0.19 has one more required argument.
    newer = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    return get_batch_on_this_cp_rank(given, **({"is_hybrid_cp": False} if newer else {}), cp_group=dist.group.WORLD)


class TestShard:
    @pytest.mark.parametrize("cp_size", [2, 3])
    def test_columns_are_megatrons(self, cp_size):
        whole = batch_of([0, 3, 4], multiple=2 * cp_size)
        for rank, expected in enumerate(run_ranks(megatrons_share, cp_size, whole=whole)):
            mine = whole.shard(rank, cp_size)
            assert torch.equal(mine.tokens, expected["tokens"])
            assert torch.equal(mine.labels, expected["labels"])
            assert torch.equal(mine.positions[None], expected["positions"])
            assert mine.weights is whole.weights and mine.index is whole.index

    @settings(max_examples=50)
    @given(cp_size=st.integers(1, 6), chunks=st.integers(1, 4))
    def test_shares_make_the_whole(self, cp_size, chunks):
        whole = batch_of([1, 2], multiple=2 * cp_size, length=2 * cp_size * chunks)
        shares = [whole.shard(rank, cp_size) for rank in range(cp_size)]
        assert {share.tokens.shape[1] for share in shares} == {whole.tokens.shape[1] // cp_size}
        positions = torch.cat([share.positions for share in shares])
        for name in ("tokens", "labels"):
            columns = torch.cat([getattr(share, name) for share in shares], dim=1)
            assert torch.equal(columns[:, positions.argsort()], getattr(whole, name))
        # Under causal attention the cost of a column is its position: equal on all ranks.
        assert len({int(share.positions.sum()) for share in shares}) == 1

    def test_a_length_that_does_not_divide(self):
        batch = batch_of([-1], multiple=7)
        with pytest.raises(ValueError, match="7 columns are not 4 equal chunks for 2 context-parallel ranks"):
            batch.shard(0, 2)

    def test_to_a_device(self):
        moved = batch_of([1, -1]).to("meta")
        assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
