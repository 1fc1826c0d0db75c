"""Tests of batches of padded rows: contents, scored tokens, dummy pairs, and shards, which must equal Megatron's."""

import doctest
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.batching import batches
from dpo_engine.batching.batches import Scored, collate
from dpo_engine.batching.trees import plant
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks

PAIRS = RandomPairs(12, 50)


def batch_of(places, **settings):
    settings = {"pad_id": 0, **settings}
    return collate([None if place < 0 else PAIRS[place] for place in places], places, **settings)


class TestCollate:
    def test_docstring_examples(self):
        result = doctest.testmod(batches)
        assert result.attempted >= 8 and result.failed == 0

    @given(
        places=st.lists(st.integers(-1, 11), min_size=1, max_size=5),
        multiple=st.integers(1, 9),
        length=st.none() | st.integers(1, 40),
    )
    def test_rows_hold_the_expected_tokens_and_scored_sites(self, places, multiple, length):
        batch = batch_of(places, multiple=multiple, length=length, pad_id=99)
        rows = [None if p < 0 else [*PAIRS[p].prompt, *PAIRS[p].chosen] for p in places]
        rows += [None if p < 0 else [*PAIRS[p].prompt, *PAIRS[p].rejected] for p in places]
        longest = max([2 if row is None else len(row) for row in rows] + [length or 0])
        assert batch.tokens.shape == (len(rows), -(-longest // multiple) * multiple)
        assert batch.tokens.shape[1] % multiple == 0 and batch.tokens.shape[1] - longest < multiple
        for number, row in enumerate(rows):
            expected = [] if row is None else row
            assert batch.tokens[number].tolist() == expected + [99] * (batch.tokens.shape[1] - len(expected))
        # There is a scored entry for each token that predicts a response token. The entry's flag `shared` is set if
        # both responses have a token at the position of the predicted token.
        found = entries(batch, batch.scored)
        assert len(found) == len(set(found))
        expected = []
        for number, row in enumerate(rows):
            if row is not None:
                pair = PAIRS[places[number % len(places)]]
                both = len(pair.prompt) + min(len(pair.chosen), len(pair.rejected))
                for column in range(len(pair.prompt), len(row)):
                    expected.append((column - 1, number, row[column], number, column < both))
        assert sorted(found) == sorted(expected)

    @pytest.mark.parametrize("limit", [1, 20, 60, 1000])
    def test_chunks_hold_as_many_whole_pairs_as_fit(self, limit, monkeypatch):
        monkeypatch.setattr(batches, "CHUNK_SITES", limit)
        places = [4, -1, 0, 7, 7, 2, -1]
        scored = batch_of(places).scored
        sizes = [0 if place < 0 else len(PAIRS[place].chosen) + len(PAIRS[place].rejected) for place in places]
        expected, open_size = [], 0
        for number, size in enumerate(sizes):
            if number and open_size + size > limit:
                expected.append((sum(sizes[:number]), sum(sizes[:number]), number))
                open_size = 0
            open_size += size
        assert list(scored.chunks) == [*expected, (sum(sizes), sum(sizes), len(places))]
        start = 0
        for _, stop, pairs in scored.chunks:
            assert (scored.owner[start:stop] % len(places) < pairs).all()
            assert (scored.owner[stop:] % len(places) >= pairs).all()
            start = stop

    def test_per_pair_columns_and_dtypes(self):
        batch = batch_of([3, -1, 5])
        assert batch.index.tolist() == [3, -1, 5] and batch.num_pairs == 2
        assert batch.weights.tolist() == [PAIRS[3].weight, 0.0, PAIRS[5].weight]
        assert torch.isnan(batch.margins).tolist() == [True, False, True]
        kinds = [tensor.dtype for tensor in (batch.tokens, batch.positions, batch.index, *batch.scored[:4])]
        assert set(kinds) == {torch.int64} and batch.weights.dtype == batch.margins.dtype == torch.float32
        assert batch.scored.shared.dtype == torch.bool and batch.segments is None
        assert batch.chosen_tokens.tolist() == [len(PAIRS[3].chosen), 0, len(PAIRS[5].chosen)]
        assert batch.rejected_tokens.tolist() == [len(PAIRS[3].rejected), 0, len(PAIRS[5].rejected)]
        assert batch.positions.tolist() == list(range(batch.tokens.shape[1]))

    def test_batch_of_dummies_only(self):
        batch = batch_of([-1, -1], multiple=4)
        assert batch.tokens.shape == (4, 4) and batch.weights.sum() == 0
        assert [len(column) for column in batch.scored[:5]] == [0] * 5 and batch.scored.chunks == ((0, 0, 2),)


def entries(batch, scored):
    """Return the scored entries as (column, row, target, owner, shared).

    The column is the position of the token that predicts the target.
    """
    sites, rows = scored.sites[scored.take], len(batch.tokens)
    columns = batch.positions[sites // rows]
    parts = columns, sites % rows, scored.targets[scored.take], scored.owner, scored.shared
    return list(zip(*(part.tolist() for part in parts), strict=True))


def labels(batch):
    """Return targets and owners as tensors with the shape of the tokens. Positions without scores contain -100."""
    targets, owners = torch.full((2, *batch.tokens.shape), -100)
    for column, row, target, owner, _ in entries(batch, batch.scored):
        place = row, batch.positions == column
        targets[place], owners[place] = target, owner
    return {"labels": targets, "owners": owners}


def megatrons_share(whole):
    """Return this rank's columns, computed by Megatron's own function."""
    from megatron.core.utils import get_batch_on_this_cp_rank
    from torch import distributed as dist

    given = {"tokens": whole.tokens, "positions": whole.positions[None], **labels(whole)}
    # Megatron 0.19 requires one more argument.
    newer = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    return get_batch_on_this_cp_rank(given, **({"is_hybrid_cp": False} if newer else {}), cp_group=dist.group.WORLD)


class TestShard:
    @pytest.mark.parametrize("cp_size", [2, 3])
    def test_shard_matches_megatron(self, cp_size):
        whole = batch_of([0, 3, 4], multiple=2 * cp_size)
        for rank, expected in enumerate(run_ranks(megatrons_share, cp_size, whole=whole)):
            mine = whole.shard(rank, cp_size)
            assert torch.equal(mine.tokens, expected["tokens"])
            for name, table in labels(mine).items():
                assert torch.equal(table, expected[name])
            assert torch.equal(mine.positions[None], expected["positions"])
            assert mine.weights is whole.weights and mine.index is whole.index

    @settings(max_examples=50)
    @given(cp_size=st.integers(1, 6), chunks=st.integers(1, 4))
    def test_shards_add_up_to_the_whole_batch(self, cp_size, chunks):
        whole = batch_of([1, 2], multiple=2 * cp_size, length=2 * cp_size * chunks)
        shares = [whole.shard(rank, cp_size) for rank in range(cp_size)]
        assert {share.tokens.shape[1] for share in shares} == {whole.tokens.shape[1] // cp_size}
        positions = torch.cat([share.positions for share in shares])
        columns = torch.cat([share.tokens for share in shares], dim=1)
        assert torch.equal(columns[:, positions.argsort()], whole.tokens)
        found = [entry for share in shares for entry in entries(share, share.scored)]
        assert sorted(found) == sorted(entries(whole, whole.scored))
        # In causal attention, the cost of a column is proportional to its position. The total cost must be equal on all
        # ranks.
        assert len({int(share.positions.sum()) for share in shares}) == 1

    def test_length_that_does_not_divide_is_refused(self):
        batch = batch_of([-1], multiple=7)
        says = "7 columns cannot be split into 4 equal chunks for 2 context-parallel ranks"
        with pytest.raises(ValueError, match=says):
            batch.shard(0, 2)

    def test_to_moves_tensors_and_keeps_metadata(self):
        for batch in (batch_of([1, -1]), plant([PAIRS[1], None], [1, -1], pad_id=0)):
            moved = vars(batch.to("meta"))
            segments, columns, digest = (moved.pop(name) for name in ("segments", "columns", "digest"))
            scored = moved.pop("scored")
            assert {tensor.device.type for tensor in (*moved.values(), *scored[:5])} == {"meta"}
            assert segments is batch.segments and columns is batch.columns and digest is batch.digest
            assert scored.chunks == batch.scored.chunks
            assert all(tensor.shape == getattr(batch, name).shape for name, tensor in moved.items())


class TestWithin:
    """Tests on two rows of four columns.

    Row 0 has three predicted tokens and belongs to pairs 0 and 1, which share the first two of these tokens. Row 1
    belongs to pair 2.
    """

    WHOLE = Scored(
        sites=torch.tensor([0, 2, 6, 1, 3]),
        targets=torch.tensor([11, 12, 13, 21, 22]),
        take=torch.tensor([0, 1, 2, 0, 1, 3, 4]),
        owner=torch.tensor([0, 0, 3, 1, 1, 2, 5]),
        shared=torch.tensor([True, False, True, True, True, True, True]),
        chunks=((3, 5, 2), (5, 7, 3)),
    )

    @pytest.mark.parametrize(
        "columns, sites, targets, take, owner, shared, chunks",
        [
            ([0, 3], [0, 2, 1], [11, 13, 21], [0, 1, 0, 2], [0, 3, 1, 2], [1, 1, 1, 1], ((2, 3, 2), (3, 4, 3))),
            ([3, 0], [2, 0, 3], [11, 13, 21], [0, 1, 0, 2], [0, 3, 1, 2], [1, 1, 1, 1], ((2, 3, 2), (3, 4, 3))),
            ([1], [0, 1], [12, 22], [0, 0, 1], [0, 1, 5], [0, 1, 1], ((1, 2, 2), (2, 3, 3))),
            ([2], [], [], [], [], [], ((0, 0, 2), (0, 0, 3))),
        ],
    )
    def test_entries_are_restricted_to_the_given_columns(self, columns, sites, targets, take, owner, shared, chunks):
        expected = (sites, targets, take, owner, shared)
        got = self.WHOLE.within(torch.tensor(columns), 2)
        assert tuple(column.tolist() for column in got[:5]) == expected and got.chunks == chunks

    def test_batch_without_scored_entries(self):
        got = batch_of([-1, -1], multiple=4).shard(1, 2)
        assert got.tokens.shape == (4, 2) and got.scored.chunks == ((0, 0, 2),)
