"""Tests of packing trees into micro-batches.

Costs must be exact and balanced, each pair must occur once, and the token budget must be respected.
"""

import collections
import gzip
import hashlib
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.batching.packing import CostModel, Tree, deal_trees, make_trees, plan_digest
from support.real_data import DATA, SETS

LLAMA_8B = CostModel.of_decoder(
    matrix_parameters=32 * (4096 * 2 * (4096 + 1024) + 3 * 4096 * 14336) + 128256 * 4096,
    num_layers=32,
    num_attention_heads=32,
    head_dim=128,
    hidden_size=4096,
    vocab_size=128256,
)
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=24)


def batch_of(names):
    """Return lengths and hashes of pairs. Each pair is a tuple of ids (prompt, chosen, rejected).

    A response id that occurs with two prompts stands for two different responses.
    """
    lengths = np.array([(1 + 7 * p, 2 + p + 3 * c, 2 + p + 3 * r) for p, c, r in names])
    parts = np.array([(p - 2, 100 * p + c, 100 * p + r) for p, c, r in names], dtype=np.int64)
    return lengths, parts


def drawn(n, seed, medians=(95, 60, 60), sigma=0.8):
    """Draw pairs with lognormal lengths, each with its own prompt."""
    lengths = np.random.default_rng(seed).lognormal(np.log(medians), sigma, (n, 3)).astype(int) + 2
    return lengths, np.arange(3 * n).reshape(n, 3)


def naive(lengths, parts, share=True):
    """Count tokens, attended token pairs and scored tokens in a slow and simple way, by testing every token pair."""
    rows = collections.defaultdict(list)
    for k, (sizes, keys) in enumerate(zip(lengths.tolist(), parts.tolist(), strict=True)):
        for response in (1, 2):
            row = rows[keys[0] if share else (k, response)]
            if not row:
                row.append(("prompt", sizes[0]))
            if not share or keys[response] not in [key for key, _ in row]:
                row.append((keys[response], sizes[response]))
    tokens = visible = scored = 0
    for row in rows.values():
        laid = [(key, i) for key, size in row for i in range(size)]
        tokens += len(laid)
        scored += sum(key != "prompt" for key, _ in laid)
        for query in laid:
            for key in laid:
                same = key[0] == query[0]
                visible += (same and key[1] <= query[1]) or (key[0] == "prompt" and not same)
    return tokens, visible, scored


def flops(lengths, parts, cost=LLAMA_8B):
    return sum(cost.flops(tree) for tree in make_trees(lengths, parts))


class TestTrees:
    @settings(deadline=None, max_examples=40)
    @given(names=PAIRS, share=st.booleans())
    def test_counts_match_a_naive_layout(self, names, share):
        lengths, parts = batch_of(names[:8])
        trees = make_trees(lengths, parts, share=share)
        assert sorted(pair for tree in trees for pair in tree.pairs) == list(range(len(lengths)))
        found = [sum(getattr(tree, what) for tree in trees) for what in ("tokens", "visible", "scored")]
        expected = naive(lengths, parts, share)
        assert tuple(found) == expected

    def test_by_hand(self):
        # Pairs 0 and 2 share a prompt of 3 tokens and a response of 2 tokens; pair 1 has another prompt.
        lengths, parts = np.array([[3, 2, 4], [5, 1, 1], [3, 1, 2]]), np.array([[7, 1, 2], [8, 4, 5], [7, 3, 1]])
        first, second = make_trees(lengths, parts)
        assert first.pairs == [0, 2] and second.pairs == [1]
        assert (first.tokens, first.scored) == (3 + 2 + 4 + 1, 7)
        assert first.visible == 1 + 2 + 3 + (4 + 5) + (4 + 5 + 6 + 7) + 4
        cost = CostModel(token=100, visible=10, scored=1)
        assert cost.flops(second) == 100 * 7 + 10 * (15 + 6 + 6) + 2
        alone = make_trees(lengths, parts, share=False)
        assert [tree.tokens for tree in alone] == [12, 12, 9]

    @pytest.mark.parametrize("window", [1, 3, 4, 6, 100])
    def test_windows_match_a_naive_count(self, window):
        tree = Tree(5, responses={0: 2, 1: 9})
        paths = [range(5), range(5, 7), range(5, 14)]
        assert tree.within(window) == sum(min(at + 1, window) for path in paths for at in path)
        twice = Tree(5, copies=2, responses={0: 2, 1: 9})
        assert twice.within(window) - tree.within(window) == sum(min(at + 1, window) for at in range(5))
        options = dict(matrix_parameters=100, num_layers=3, num_attention_heads=2, head_dim=4, hidden_size=2)
        cost = CostModel.of_decoder(**options, vocab_size=10, windows=[window, window])
        assert cost.flops(tree) == 2 * 80 * 16 + 32 * (tree.visible + 2 * tree.within(window)) + 40 * 11

    def test_costs_match_the_operations_of_a_model(self, tiny_hf):
        """Compare the cost model with the FLOPs of a transformers model.

        The eager attention of this model computes all n x n (query, key) pairs, including masked ones.
        """
        import torch
        from torch.utils.flop_counter import FlopCounterMode
        from transformers import AutoModelForCausalLM

        from dpo_engine.model.architecture import read_architecture

        arch, n = read_architecture(tiny_hf("llama")), 24
        cost = CostModel.of_decoder(
            matrix_parameters=arch.matrix_parameters,
            num_layers=arch.num_layers,
            num_attention_heads=arch.num_attention_heads,
            head_dim=arch.head_dim,
            hidden_size=arch.hidden_size,
            vocab_size=arch.vocab_size,
        )
        model = AutoModelForCausalLM.from_pretrained(tiny_hf("llama"), attn_implementation="eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.arange(n)[None])
        expected = counter.get_total_flops()
        assert cost.token * n + cost.visible * n * n + cost.scored * n == expected


class TestDealing:
    @settings(deadline=None, max_examples=200)
    @given(
        names=PAIRS,
        dp_size=st.integers(1, 5),
        budget=st.integers(1, 120),
        multiple=st.integers(1, 3),
        share=st.booleans(),
    )
    def test_properties(self, names, dp_size, budget, multiple, share):
        lengths, parts = batch_of(names)
        indices = np.arange(len(names)) * 3 + 50
        options = {"dp_size": dp_size, "tokens_per_micro_batch": budget, "multiple": multiple, "share": share}
        dealt = deal_trees(indices, lengths, parts, cost=LLAMA_8B, **options)
        # Each pair occurs once, and all ranks have the same number of micro-batches.
        assert sorted(pair for rank in dealt for pairs in rank for pair in pairs) == indices.tolist()
        assert len(dealt) == dp_size and all(pairs.dtype == np.int64 for rank in dealt for pairs in rank)
        (count,) = {len(rank) for rank in dealt}
        assert count % multiple == 0 and count > 0
        assert count - multiple < len(names)
        for rank in dealt:
            costs = []
            for pairs in rank:
                places = (pairs - 50) // 3
                trees = make_trees(lengths[places], parts[places], share=share)
                assert sum(tree.tokens for tree in trees) <= budget or len(pairs) == 1
                # Pairs with the same prompt are adjacent.
                prompts = parts[places, 0].tolist()
                changes = sum(a != b for a, b in zip(prompts, prompts[1:], strict=False))
                assert not share or changes == len(set(prompts)) - 1 or not prompts
                costs.append(sum(map(LLAMA_8B.flops, trees)))
            # The costs of a rank's micro-batches first rise and then fall, so the cheapest micro-batches are at the
            # ends.
            top = costs.index(max(costs))
            assert costs[: top + 1] == sorted(costs[: top + 1])
            assert costs[top:] == sorted(costs[top:], reverse=True)
        again = deal_trees(indices, lengths, parts, cost=LLAMA_8B, **options)
        assert all((a == b).all() for r, s in zip(dealt, again, strict=True) for a, b in zip(r, s, strict=True))

    @settings(deadline=None, max_examples=100)
    @given(names=PAIRS, dp_size=st.integers(1, 5))
    def test_prompt_that_fits_stays_on_one_rank(self, names, dp_size):
        lengths, parts = batch_of(names)
        dealt = deal_trees(
            np.arange(len(names)), lengths, parts, cost=LLAMA_8B, dp_size=dp_size, tokens_per_micro_batch=200
        )
        held = [{int(parts[pair, 0]) for pair in pairs} for rank in dealt for pairs in rank]
        assert sum(map(len, held)) == len(set(parts[:, 0].tolist()))

    def test_tree_over_the_budget_is_split_into_pieces_of_whole_pairs(self):
        # Four responses of 10 tokens to a prompt of 20 tokens form six pairs. The prompt and all four responses have 60
        # tokens in total. The prompt and three responses have 50. With a budget of 50 tokens, the pairs are sorted by
        # their responses, and then split into three pieces: 0-1 0-2 | 0-3 | 1-2 1-3 2-3. Here, 0-1 is the pair of
        # responses 0 and 1. With a budget of 49 tokens, each piece has one pair.
        names = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
        lengths, parts = np.full((6, 3), 10), np.array([(9, *pair) for pair in names])
        lengths[:, 0] = 20
        (rank,) = deal_trees(np.arange(6), lengths, parts, cost=LLAMA_8B, dp_size=1, tokens_per_micro_batch=50)
        assert sorted(sorted(pairs) for pairs in rank) == [[0, 2], [1, 3, 5], [4]]
        (rank,) = deal_trees(np.arange(6), lengths, parts, cost=LLAMA_8B, dp_size=1, tokens_per_micro_batch=49)
        assert [len(pairs) for pairs in rank] == [1] * 6

    def test_pair_over_the_budget_gets_its_own_micro_batch(self):
        lengths, parts = drawn(6, 0)
        lengths[2] = 500, 400, 300
        (rank,) = deal_trees(np.arange(6), lengths, parts, cost=LLAMA_8B, dp_size=1, tokens_per_micro_batch=600)
        assert [2] in [pairs.tolist() for pairs in rank]

    def test_duplicate_pair_is_stored_once_and_trained_twice(self):
        lengths, parts = batch_of([(1, 2, 3), (2, 1, 0), (1, 2, 3)])
        dealt = deal_trees(np.array([4, 8, 4]), lengths, parts, cost=LLAMA_8B, dp_size=2, tokens_per_micro_batch=100)
        assert sorted([pairs.tolist() for rank in dealt for pairs in rank]) == [[4, 4], [8]]

    def test_fewer_trees_than_ranks_leave_empty_micro_batches(self):
        lengths, parts = drawn(2, 0)
        dealt = deal_trees(
            np.arange(2), lengths, parts, cost=LLAMA_8B, dp_size=3, tokens_per_micro_batch=4096, multiple=2
        )
        assert sorted(len(pairs) for rank in dealt for pairs in rank) == [0, 0, 0, 0, 1, 1]

    def test_distribution_is_stable_across_versions(self):
        # These are recorded values. If they change, increment packing.VERSION, so that the plan's identifier in the log
        # changes too.
        lengths = np.array([[(7 * i) % 31 + 3, (5 * i) % 17 + 2, (11 * i) % 23 + 2] for i in range(12)])
        parts = np.array([[i // 2 if i < 6 else i, 100 + i, 200 + i] for i in range(12)])
        lengths[:6, 0] = lengths[0:6:2, 0].repeat(2)
        dealt = deal_trees(np.arange(12), lengths, parts, cost=LLAMA_8B, dp_size=2, tokens_per_micro_batch=100)
        assert [[pairs.tolist() for pairs in rank] for rank in dealt] == [
            [[8], [2, 3], [0, 1, 6]],
            [[7, 11], [4, 5], [9, 10]],
        ]


class TestBalance:
    @pytest.mark.parametrize("seed", range(4))
    def test_balance_for_lognormal_lengths(self, seed):
        lengths, parts = drawn(128, seed, sigma=0.6)
        check_balance(lengths, parts, contiguous=1.05)

    @pytest.mark.skipif(
        not DATA.is_dir(), reason=f"no preference data in {DATA}; set DPO_TEST_DATA to use another directory"
    )
    def test_balance_for_real_pairs(self):
        """Measure the balance on real pairs. Each word and each punctuation mark counts as a token."""
        with gzip.open(DATA / SETS["harmless"], "rt", encoding="utf-8") as lines:
            rows = [[json.loads(line)[part] for part in ("prompt", "chosen", "rejected")] for line in lines]
        lengths = np.array([[len(re.findall(r"\w+|[^\w\s]", text)) + 1 for text in row] for row in rows])
        parts = np.array([[number_of(text) for text in row] for row in rows])
        found = [check_balance(lengths[k : k + 128], parts[k : k + 128]) for k in range(0, len(rows) - 127, 128)]
        assert 1.15 < np.mean(found) < 1.35

    def test_micro_batches_of_a_rank_are_balanced(self):
        lengths, parts = drawn(256, 1, sigma=0.5)
        dealt = deal_trees(np.arange(256), lengths, parts, cost=LLAMA_8B, dp_size=2, tokens_per_micro_batch=4096)
        costs = np.array([[flops(lengths[p], parts[p]) for p in rank] for rank in dealt])
        tokens = lengths.sum()
        assert costs.shape[1] == -(-tokens // (2 * 4096))  # as few micro-batches as possible
        assert costs.max() / costs.mean() <= 1.02

    def test_planning_500_pairs_takes_under_30_ms(self):
        lengths, parts = drawn(512, 2)
        taken = []
        for _ in range(3):
            start = time.process_time()
            deal_trees(np.arange(512), lengths, parts, cost=LLAMA_8B, dp_size=8, tokens_per_micro_batch=8192)
            taken.append(time.process_time() - start)
        assert min(taken) < 0.03


def number_of(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def check_balance(lengths, parts, contiguous=1.0):
    """Check the distribution of 128 pairs over 8 ranks.

    The largest cost of a rank must be close to the mean cost, and splitting trees must add few tokens. Returns the
    imbalance (the largest cost divided by the mean cost) that would result if each rank got consecutive pairs. This
    imbalance must exceed ``contiguous``.
    """
    dealt = deal_trees(np.arange(128), lengths, parts, cost=LLAMA_8B, dp_size=8, tokens_per_micro_batch=8192)
    ranks = [np.concatenate(rank) for rank in dealt]
    costs = np.array([flops(lengths[rank], parts[rank]) for rank in ranks], dtype=float)
    assert costs.max() / costs.mean() <= 1.005
    executed = sum(tree.tokens for rank in dealt for p in rank for tree in make_trees(lengths[p], parts[p]))
    useful = sum(tree.tokens for tree in make_trees(lengths, parts))
    assert useful / executed >= 0.995
    plain = np.array([flops(lengths[p], parts[p]) for p in np.split(np.arange(128), 8)], dtype=float)
    assert plain.max() / plain.mean() > contiguous
    return plain.max() / plain.mean()


def test_digest_depends_on_everything_that_decides_the_plan(monkeypatch):
    from dpo_engine.batching import packing

    cases = [("d", LLAMA_8B, {"tokens_per_micro_batch": 8192, "share": True})]
    cases += [("e", *cases[0][1:]), ("d", CostModel(1, 2, 3), cases[0][2])]
    cases += [("d", CostModel(1, 2, 3, ((8, 4),)), cases[0][2])]
    cases += [("d", LLAMA_8B, cases[0][2] | change) for change in ({"share": False}, {"tokens_per_micro_batch": 1})]
    found = [plan_digest(data, cost, **options) for data, cost, options in cases]
    assert found[0] == plan_digest("d", LLAMA_8B, share=True, tokens_per_micro_batch=8192)
    assert found[0] == "6777520bfc4cbe59"  # earlier versions log this identifier for this plan
    monkeypatch.setattr(packing, "VERSION", packing.VERSION + 1)
    found.append(plan_digest("d", LLAMA_8B, share=True, tokens_per_micro_batch=8192))
    assert len(set(found)) == len(found)
