"""Tests of the layout that `auto` chooses, and of micro-batches.

Micro-batches must contain each pair once, have equal sizes on all ranks, and respect the token budget.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from dpo_engine.batching.micro_batches import (
    choose_layout,
    stacked_batches,
    token_budget,
    tree_batches,
    tree_plan,
    visible_share,
)
from dpo_engine.batching.packing import CostModel
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.trajectory import run_config
from dpo_engine.training.engine import Engine
from dpo_kernels import Tree

COST = CostModel(token=100, visible=1, scored=50)


def of_lengths(*lengths, prompts=None):
    keys = np.arange(len(lengths)) if prompts is None else np.array(prompts)
    return SimpleNamespace(lengths=np.array(lengths, dtype=np.int32), prompt_keys=keys)


def config(tmp_path, **sections):
    return run_config("m", tmp_path, **{"batch": {"layout": "auto"}, **sections})


class TestAuto:
    def test_auto_takes_trees_for_repeated_prompts(self, tmp_path):
        pairs = of_lengths((60, 20, 20), (60, 20, 20))
        layout, reason = choose_layout(config(tmp_path), pairs, slow_trees=False)
        # The stacked layout has two rows of 80 tokens for each pair, and a tree has 100 tokens.
        assert layout == "tree"
        assert reason == "stacked computes 1.60x as many tokens as tree, and prompts are 60% of a pair's tokens"

    def test_auto_takes_stacked_for_short_prompts_of_equal_length(self, tmp_path):
        layout, reason = choose_layout(config(tmp_path), of_lengths((1, 50, 50)), slow_trees=False)
        assert layout == "stacked" and "stacked computes 1.01x as many tokens" in reason

    def test_padding_counts_toward_the_choice(self, tmp_path):
        pairs = of_lengths((1, 50, 10), (1, 10, 10))
        alone = config(tmp_path, train={"micro_batch_size": 1})
        assert "stacked computes 1.51x" in choose_layout(alone, pairs, slow_trees=False)[1]  # (102 + 22) / 82
        both = config(tmp_path, train={"micro_batch_size": 2})
        assert "stacked computes 2.49x" in choose_layout(both, pairs, slow_trees=False)[1]  # 204 / 82
        for tokens, gain in [(203, 1.51), (204, 2.49), (9999, 2.49)]:
            batch = {"layout": "auto", "tokens_per_micro_batch": tokens}
            sized = config(tmp_path, batch=batch, train={"micro_batch_size": None})
            assert f"stacked computes {gain}x" in choose_layout(sized, pairs, slow_trees=False)[1]

    def test_without_sharing_only_padding_is_saved(self, tmp_path):
        plain = config(tmp_path, batch={"layout": "auto", "share": False}, train={"micro_batch_size": 2})
        pairs = of_lengths((60, 20, 20), (60, 20, 20), prompts=[5, 5])
        layout, reason = choose_layout(plain, pairs, slow_trees=False)
        assert layout == "stacked" and reason.startswith("stacked computes 1.00x as many tokens as tree, and ")
        layout, reason = choose_layout(plain, of_lengths((10, 80, 10), (10, 20, 20)), slow_trees=False)
        assert layout == "tree" and "stacked computes 2.12x as many tokens" in reason  # 4 x 90 / (110 + 60)

    def test_group_by_prompt_is_suggested_for_shared_prompts(self, tmp_path):
        pairs = of_lengths((60, 20, 20), (60, 20, 20), prompts=[5, 5])
        reason = choose_layout(config(tmp_path), pairs, slow_trees=False)[1]
        assert reason.endswith(
            "pairs share prompts; data.group_by_prompt=true may reduce tree's token count further, by a factor of up "
            "to 1.43"
        )
        grouped = config(tmp_path, data={"train": "unused.jsonl", "group_by_prompt": True})
        assert "group_by_prompt" not in choose_layout(grouped, pairs, slow_trees=False)[1]

    def test_auto_stays_with_stacked_where_trees_are_slow(self, tmp_path):
        layout, reason = choose_layout(config(tmp_path), of_lengths((60, 20, 20)), slow_trees=True)
        assert layout == "stacked" and "trees are slow on a GPU with this attention backend" in reason

    @pytest.mark.parametrize("layout", ["stacked", "tree"])
    def test_explicit_layout_is_used(self, layout, tmp_path):
        asked = config(tmp_path, batch={"layout": layout})
        assert choose_layout(asked, of_lengths((60, 20, 20)), slow_trees=True) == (layout, "as configured")


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("each", [1, 2, 5])
def test_visible_share_of_full_rows(share, each, tmp_path):
    parents = [parent for i in range(each) for parent in (-1, 3 * i, 3 * i)]
    tree = Tree.of([60, 25, 10] * each, parents) if share else Tree.of([85, 70] * each, [-1] * 2 * each)
    expected = tree.visible / tree.n**2
    asked = config(tmp_path, batch={"layout": "tree", "share": share, "tokens_per_micro_batch": tree.n})
    many = of_lengths(*[(60, 25, 10)] * 4 * each)
    assert visible_share(asked, many, 1) == pytest.approx(expected)
    # If all pairs of the data set fit into the budget, one row holds all of them. If a rank's part of a global batch is
    # smaller than the data set and fits into the budget, one row holds only this part.
    wide = {"layout": "tree", "share": share, "tokens_per_micro_batch": 100 * tree.n}
    few = of_lengths(*[(60, 25, 10)] * each)
    assert visible_share(config(tmp_path, batch=wide), few, 1) == pytest.approx(expected)
    stepwise = config(tmp_path, batch=wide, train={"global_batch_size": 2 * each, "micro_batch_size": 1})
    assert visible_share(stepwise, many, 2) == pytest.approx(expected)


class TestStacked:
    def batches(self, tmp_path, pairs, *, dp=1, pp=1, vpp=None, tp=1, **sized):
        dims = ParallelDims(tp, pp, vpp, 1, 1, tp * dp * pp)
        train, batch = {"micro_batch_size": None}, {"layout": "stacked", **sized}
        asked = config(tmp_path, batch=batch, train=train)
        return [stacked_batches(pairs, np.arange(len(pairs)), asked, dims, rank, tp > 1) for rank in range(dp)]

    @pytest.mark.parametrize("dp", [1, 2, 3])
    @pytest.mark.parametrize("tp", [1, 4])
    def test_micro_batches_are_full_but_within_the_budget(self, dp, tp, tmp_path):
        pairs = RandomPairs(23, 50)
        ranks = self.batches(tmp_path, pairs, dp=dp, tp=tp, tokens_per_micro_batch=300)
        found = sorted(index for rank in ranks for batch in rank for index in batch.index.tolist() if index >= 0)
        assert found == list(range(23))
        assert len({tuple(len(batch.index) for batch in rank) for rank in ranks}) == 1
        shapes = [batch.tokens.shape for rank in ranks for batch in rank]
        assert max(rows * columns for rows, columns in shapes) <= 300
        # Each rank has its longest pairs first. The k-th pair of the first rank is at least as long as the k-th pair of
        # any other rank. On the first rank, only the last micro-batch can have room for another pair.
        for batch in ranks[0][:-1]:
            rows, columns = batch.tokens.shape
            assert (rows + 2) * columns > 300

    def test_a_pair_longer_than_the_budget_is_alone(self, tmp_path):
        (batches,) = self.batches(tmp_path, RandomPairs(5, 50), tokens_per_micro_batch=1)
        assert [len(batch.index) for batch in batches] == [1] * 5

    def test_interleaved_schedule_gets_micro_batches_of_one_shape(self, tmp_path):
        pairs = RandomPairs(17, 50)
        ranks = self.batches(tmp_path, pairs, dp=2, pp=2, vpp=2, tokens_per_micro_batch=300)
        ((rows, columns),) = {batch.tokens.shape for rank in ranks for batch in rank}
        assert rows * columns <= 300 < (rows + 2) * columns and len(ranks[0]) % 2 == 0
        # A rank gets up to 9 pairs. With two micro-batches fewer, 9 pairs would not fit.
        assert (len(ranks[0]) - 2) * rows // 2 < 9 <= len(ranks[0]) * rows // 2


def test_unsettled_micro_batches_are_refused(tmp_path):
    """Check that `Engine.host_batches` refuses a configuration if the layout or the micro-batch size is not chosen yet.

    Otherwise, a benchmark or a plugin could use micro-batches that differ from those of `train`.
    """
    for sections in ({}, {"batch": {"layout": "stacked"}, "train": {"micro_batch_size": None}}):
        engine = SimpleNamespace(config=config(tmp_path, **sections))
        with pytest.raises(RuntimeError, match="Engine.host_batches: call Engine.settle_batches first, before a model"):
            Engine.host_batches(engine, None, None)


class TestTrees:
    def batches(self, tmp_path, pairs, *, dp=1, pp=1, vpp=None, budget=None, count=None, **batch):
        dims = ParallelDims(1, pp, vpp, 1, 1, dp * pp)
        asked = config(tmp_path, batch={"layout": "tree", "tokens_per_micro_batch": budget, **batch})
        indices = np.arange(count or len(pairs))
        return [tree_batches(pairs, indices, asked, dims, rank, False, COST) for rank in range(dp)]

    @pytest.mark.parametrize("dp", [1, 2, 3])
    def test_each_pair_occurs_once_and_ranks_have_equal_sizes(self, dp, tmp_path):
        pairs = RandomPairs(17, 50, few=3)
        ranks = self.batches(tmp_path, pairs, dp=dp, budget=70)
        found = sorted(index for rank in ranks for batch in rank for index in batch.index.tolist() if index >= 0)
        assert found == list(range(17))
        assert len({len(rank) for rank in ranks}) == 1
        assert len({sum(len(batch.index) for batch in rank) for rank in ranks}) == 1
        assert all(len(batch.index) for rank in ranks for batch in rank)
        assert max(batch.tokens.shape[1] for rank in ranks for batch in rank) <= 70

    def test_no_padding_tokens_are_executed(self, tmp_path):
        pairs = RandomPairs(40, 50)
        (batches,) = self.batches(tmp_path, pairs, budget=200)
        assert sum(batch.tokens.numel() for batch in batches) == pairs.lengths.sum()

    def test_without_sharing_each_response_repeats_its_prompt(self, tmp_path):
        pairs = RandomPairs(10, 50, few=3)
        (batches,) = self.batches(tmp_path, pairs, budget=200, share=False)
        assert sum(batch.tokens.numel() for batch in batches) == (pairs.lengths @ [2, 1, 1]).sum()

    def test_interleaved_schedule_gets_rows_of_one_length(self, tmp_path):
        ranks = self.batches(tmp_path, RandomPairs(17, 50), dp=2, pp=2, vpp=2, budget=90)
        assert len({batch.tokens.shape for rank in ranks for batch in rank}) == 1 and len(ranks[0]) % 2 == 0

    def test_large_batches_are_planned_in_parts(self, tmp_path, monkeypatch):
        from dpo_engine.batching import micro_batches

        monkeypatch.setattr(micro_batches, "PLANNED_TOGETHER", 5)
        ranks = self.batches(tmp_path, RandomPairs(17, 50), dp=2, budget=70)
        found = sorted(index for rank in ranks for batch in rank for index in batch.index.tolist() if index >= 0)
        assert found == list(range(17)) and len(ranks[0]) == len(ranks[1])

    def test_default_budget_fits_the_longest_pairs(self, tmp_path):
        pairs = of_lengths((1, 2, 3), (10, 20, 30), (4, 5, 6))
        asked = config(tmp_path, train={"micro_batch_size": 2})
        assert token_budget(pairs, asked) == 60 + 15
        plain = config(tmp_path, train={"micro_batch_size": 2}, batch={"share": False})
        assert token_budget(pairs, plain) == 70 + 19
        assert token_budget(pairs, config(tmp_path, batch={"tokens_per_micro_batch": 7})) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"seed": 1}},
        {"data": {"shuffle": False}},
        {"data": {"group_by_prompt": True}},
        {"data": {"train": [{"path": "a.jsonl", "weight": 2.0}, "b.jsonl"]}},
        {"train": {"global_batch_size": 8}},
        {"batch": {"tokens_per_micro_batch": 9}},
        {"batch": {"share": False}},
    ],
    ids=str,
)
def test_plan_digest_depends_on_every_setting_of_the_plan(change, tmp_path):
    pairs = of_lengths((1, 2, 3))
    pairs.digest = "d"
    base = {"data": {"train": ["a.jsonl", "b.jsonl"]}}
    expected = tree_plan(config(tmp_path, **base), pairs, COST)
    assert expected == tree_plan(config(tmp_path, **base), pairs, COST)
    sections = {name: {**base.get(name, {}), **change.get(name, {})} for name in {*base, *change}}
    assert tree_plan(config(tmp_path, **sections), pairs, COST) != expected
