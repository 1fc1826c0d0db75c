"""Tests of the order of pairs, the blending of sources, and the distribution of pairs over ranks.

The tests also check how many times each pair is used, and how a plan continues when a run resumes.
"""

import collections
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.batching.plan import Plan, Position, blended_order, deal, draws_per_source, epoch_order

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)
WEIGHTS = st.lists(st.floats(0.05, 20.0), min_size=4, max_size=4)


def ids_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def plan_of(sizes, **settings):
    dataset = type("Pairs", (SimpleNamespace,), {"__len__": lambda self: len(self.source_ids)})
    prompts = settings.pop("prompts", None)
    settings = {"global_batch_size": 8, **settings}
    return Plan(dataset(source_ids=ids_of(sizes), prompt_keys=prompts), **settings)


class TestOrder:
    def test_permutation_is_stable_across_numpy_versions(self):
        # These are recorded values. A resumed run must use the same order, even with a later version of NumPy.
        assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
        assert epoch_order(8, seed=3, epoch=2, source=1).tolist() == [5, 1, 4, 6, 3, 0, 7, 2]

    @given(n=st.integers(0, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
    def test_order_is_a_deterministic_permutation(self, n, seed, epoch):
        order = epoch_order(n, seed=seed, epoch=epoch)
        assert sorted(order) == list(range(n))
        assert (order == epoch_order(n, seed=seed, epoch=epoch)).all()
        assert epoch_order(n, seed=seed, epoch=epoch, shuffle=False).tolist() == list(range(n))

    def test_seed_epoch_and_source_each_change_the_order(self):
        orders = [epoch_order(50, seed=s, epoch=e, source=k).tolist() for s in (0, 1) for e in (0, 1) for k in (0, 1)]
        assert len({tuple(order) for order in orders}) == 8

    def test_every_position_is_equally_likely(self):
        places = np.array([epoch_order(4, seed=1, epoch=epoch).tolist() for epoch in range(4000)])
        counts = np.array([[(places[:, place] == pair).sum() for pair in range(4)] for place in range(4)])
        assert abs(counts - 1000).max() < 5 * np.sqrt(1000 * 0.75)


class TestBlending:
    @given(sizes=SIZES, weight=st.floats(0.01, 100.0), seed=st.integers(0, 9), epoch=st.integers(0, 9))
    def test_equal_weights_concatenate_the_sources(self, sizes, weight, seed, epoch):
        weights = [weight] * len(sizes)
        assert draws_per_source(sizes, weights) == sizes
        order = blended_order(ids_of(sizes), weights, seed=seed, epoch=epoch)
        assert sorted(order) == list(range(sum(sizes)))
        plain = blended_order(ids_of(sizes), weights, seed=seed, epoch=epoch, shuffle=False)
        assert plain.tolist() == list(range(sum(sizes)))

    @given(sizes=SIZES, weights=WEIGHTS)
    def test_proportions_over_an_epoch(self, sizes, weights):
        weights = weights[: len(sizes)]
        draws = draws_per_source(sizes, weights)
        assert sum(draws) == sum(sizes)
        shares = np.array(sizes) * np.array(weights)
        assert (abs(draws - sum(sizes) * shares / shares.sum()) < 1 + 1e-6).all()
        order = blended_order(ids_of(sizes), weights, seed=0, epoch=3)
        assert np.bincount(ids_of(sizes)[order], minlength=len(sizes)).tolist() == draws

    @given(sizes=SIZES, weights=WEIGHTS, epoch=st.integers(0, 5))
    def test_proportions_within_an_epoch(self, sizes, weights, epoch):
        weights = weights[: len(sizes)]
        draws = np.array(draws_per_source(sizes, weights))
        drawn = ids_of(sizes)[blended_order(ids_of(sizes), weights, seed=0, epoch=epoch)]
        so_far = np.cumsum(drawn[:, None] == np.arange(len(sizes)), axis=0)
        expected = np.arange(1, len(drawn) + 1)[:, None] * draws / draws.sum()
        assert abs(so_far - expected).max() <= 0.5 + len(sizes) / 2

    def test_by_hand(self):
        # Source 0 has 2 pairs and weight 1; source 1 has 4 pairs and weight 2. Their shares of the 6 draws of an epoch
        # are (2 x 1) / 10 and (4 x 2) / 10. Before rounding, these are 1.2 and 4.8 draws.
        assert draws_per_source([2, 4], [1.0, 2.0]) == [1, 5]
        # The shares of the three sources are equal, except for floating-point errors. Each source gets 2 of the 7
        # draws, and the first source also gets the remaining draw.
        assert draws_per_source([3, 3, 1], [0.1, 0.1, 0.3]) == [3, 2, 2]
        ids = ids_of([2, 4])
        orders = [blended_order(ids, [1.0, 2.0], seed=0, epoch=e, shuffle=False).tolist() for e in range(3)]
        assert orders == [[0, 2, 3, 4, 5, 2], [1, 3, 4, 5, 2, 3], [0, 4, 5, 2, 3, 4]]

    @settings(deadline=None)
    @given(sizes=SIZES, weights=WEIGHTS, seed=st.integers(0, 9))
    def test_source_is_used_up_before_it_repeats(self, sizes, weights, seed):
        weights = weights[: len(sizes)]
        stream = np.concatenate([blended_order(ids_of(sizes), weights, seed=seed, epoch=e) for e in range(6)])
        counts = collections.Counter(stream.tolist())
        for source in range(len(sizes)):
            times = [counts[pair] for pair in np.flatnonzero(ids_of(sizes) == source)]
            assert not times or max(times) - min(times) <= 1

    def test_sources_are_mixed_in_every_batch(self):
        plan = plan_of([300, 100], global_batch_size=40)
        for step in range(plan.num_steps):
            assert abs((plan.pairs(step) < 300).sum() - 30) <= 1


class TestDealing:
    @settings(max_examples=300)
    @given(
        n=st.integers(0, 70),
        dp_size=st.integers(1, 9),
        sizes=st.lists(st.integers(1, 9), min_size=70),
    )
    def test_properties(self, n, dp_size, sizes):
        indices = np.arange(1000, 1000 + n)
        shares = [deal(indices, dp_rank=r, dp_size=dp_size, sizes=sizes) for r in range(dp_size)]
        dealt = np.concatenate([place for share in shares for place in share])
        # Each pair is on exactly one rank.
        assert sorted(dealt[dealt >= 0]) == indices.tolist() and set(dealt[dealt < 0]) <= {-1}
        assert all([len(place) for place in share] == sizes for share in shares)
        # The numbers of pairs on any two ranks differ by at most one. On each rank, dummies come last.
        real = [int((np.concatenate(share) >= 0).sum()) for share in shares]
        assert max(real) - min(real) <= 1
        for share in shares:
            assert (np.diff((np.concatenate(share) >= 0).astype(int)) <= 0).all()

    def test_by_hand(self):
        dealt = [deal(np.arange(10, 17), dp_rank=r, dp_size=2, sizes=[3, 2]) for r in (0, 1)]
        assert [[place.tolist() for place in share] for share in dealt] == [
            [[10, 12, 14], [16, -1]],
            [[11, 13, 15], [-1, -1]],
        ]


class TestPlan:
    @settings(deadline=None)
    @given(
        n=st.integers(1, 50),
        size=st.integers(1, 60),
        epochs=st.integers(1, 3),
        shuffle=st.booleans(),
        limit=st.none() | st.integers(1, 40),
    )
    def test_each_epoch_uses_every_pair_once(self, n, size, epochs, shuffle, limit):
        plan = plan_of([n], global_batch_size=size, epochs=epochs, shuffle=shuffle, max_steps=limit, seed=5)
        assert plan.steps_per_epoch == -(-n // size)
        every = epochs * plan.steps_per_epoch
        assert plan.num_steps == (every if limit is None else min(limit, every))
        batches = [plan.pairs(step) for step in range(plan.num_steps)]
        assert all(0 < len(batch) <= size for batch in batches)
        for start in range(0, plan.num_steps - plan.steps_per_epoch + 1, plan.steps_per_epoch):
            assert sorted(np.concatenate(batches[start : start + plan.steps_per_epoch])) == list(range(n))

    def test_steps_can_be_read_in_any_order(self):
        plan, other = plan_of([20, 30], weights=[1.0, 3.0], epochs=4), plan_of([20, 30], weights=[1.0, 3.0], epochs=4)
        forward = [plan.pairs(step).tolist() for step in range(plan.num_steps)]
        backward = [other.pairs(step).tolist() for step in reversed(range(plan.num_steps))][::-1]
        assert forward == backward

    def test_epochs_and_seeds_differ(self):
        plan = plan_of([64], global_batch_size=64, epochs=2)
        assert plan.pairs(0).tolist() != plan.pairs(1).tolist()
        assert plan.pairs(0).tolist() != plan_of([64], global_batch_size=64, seed=1).pairs(0).tolist()
        still = plan_of([64], global_batch_size=64, epochs=2, shuffle=False)
        assert still.pairs(0).tolist() == still.pairs(1).tolist() == list(range(64))

    def test_step_out_of_range_is_refused(self):
        plan = plan_of([20])
        for step in (-1, 3):
            with pytest.raises(IndexError, match=rf"step {step} is not in this plan \(steps 0 to 2\)"):
                plan.pairs(step)


class TestGroupedByPrompt:
    """With `data.group_by_prompt`, the draws from a source are ordered so that pairs with the same prompt are adjacent.

    The sources are still mixed in proportion. With equal weights, each pair still occurs once per epoch.
    """

    @given(
        prompts=st.lists(st.integers(0, 5), min_size=1, max_size=40), seed=st.integers(0, 9), epoch=st.integers(0, 3)
    )
    def test_one_source_keeps_prompts_together(self, prompts, seed, epoch):
        prompts = np.array(prompts)
        order = blended_order(np.zeros(len(prompts), int), [1.0], seed=seed, epoch=epoch, prompts=prompts)
        assert sorted(order) == list(range(len(prompts)))
        runs = 1 + int((np.diff(prompts[order]) != 0).sum())
        assert runs == len(set(prompts.tolist()))
        for prompt in set(prompts.tolist()):
            mine = order[prompts[order] == prompt].tolist()
            assert mine == sorted(mine), "the pairs of a prompt must stay in the order of the file"

    def test_prompts_are_shuffled_and_epochs_differ(self):
        prompts = np.repeat(np.arange(50), 3)
        orders = [
            blended_order(np.zeros(150, int), [1.0], seed=1, epoch=epoch, prompts=prompts).tolist() for epoch in (0, 1)
        ]
        assert orders[0] != orders[1] and orders[0] != list(range(150))

    def test_without_shuffle_prompts_keep_the_file_order(self):
        prompts = np.array([7, 3, 7, 9, 3])
        order = blended_order(np.zeros(5, int), [1.0], seed=1, epoch=0, shuffle=False, prompts=prompts)
        assert order.tolist() == [0, 2, 1, 4, 3]

    def test_sources_keep_their_proportions(self):
        sources = np.repeat([0, 1], [60, 30])
        order = blended_order(sources, [1.0, 1.0], seed=1, epoch=0, prompts=np.arange(90) // 3)
        assert sorted(order) == list(range(90))
        for start in range(0, 90, 15):
            assert abs((sources[order[start : start + 15]] == 0).sum() - 10) <= 1

    def test_group_by_prompt_puts_a_prompts_pairs_in_one_step(self):
        prompts = np.arange(40) % 10
        grouped = plan_of([40], prompts=prompts, group_by_prompt=True, global_batch_size=4, epochs=2)
        apart = plan_of([40], prompts=prompts, global_batch_size=4, epochs=2)
        assert all(len(set(prompts[grouped.pairs(step)])) == 1 for step in range(20))
        assert any(len(set(prompts[apart.pairs(step)])) > 1 for step in range(20))


class TestPosition:
    @given(
        n=st.integers(1, 40), batch=st.integers(1, 12), epochs=st.integers(1, 4), cut=st.integers(0, 99), data=st.data()
    )
    def test_plan_resumes_from_any_step(self, n, batch, epochs, cut, data):
        max_steps = data.draw(st.none() | st.integers(1, 50))
        settings = {"global_batch_size": batch, "epochs": epochs, "max_steps": max_steps, "seed": 3}
        whole = plan_of([n], **settings)
        step = min(cut, whole.num_steps)
        rest = plan_of([n], start=whole.position(step), **settings)
        assert rest.num_steps == whole.num_steps
        for later in range(step, whole.num_steps):
            assert rest.pairs(later).tolist() == whole.pairs(later).tolist()
            assert rest.position(later) == whole.position(later)

    @given(n=st.integers(1, 40), batch=st.integers(1, 12), then=st.integers(1, 12), cut=st.integers(0, 99))
    def test_changed_batch_size_uses_each_pair_once(self, n, batch, then, cut):
        first = plan_of([n], global_batch_size=batch, epochs=3)
        step = min(cut, first.num_steps)
        second = plan_of([n], global_batch_size=then, epochs=3, start=first.position(step))
        steps = [first.pairs(k) for k in range(step)] + [second.pairs(k) for k in range(step, second.num_steps)]
        expected = [first.epoch(epoch).tolist() for epoch in range(3)]
        taken = np.concatenate(steps)
        assert [taken[i * n : (i + 1) * n].tolist() for i in range(3)] == expected and len(taken) == 3 * n

    def test_this_epoch_and_the_next_are_ordered_once(self, monkeypatch):
        """Near an epoch's end, calls alternate between two epochs, because pairs are read one step ahead."""
        ordered = []
        monkeypatch.setattr(
            "dpo_engine.batching.plan.blended_order",
            lambda *rest, epoch, **named: ordered.append(epoch) or blended_order(*rest, epoch=epoch, **named),
        )
        plan = plan_of([24], global_batch_size=12, epochs=4)
        assert plan.digest == plan.digest
        for step in range(plan.num_steps):
            for near in (step, min(step + 1, plan.num_steps - 1), step):
                plan.pairs(near)
        assert ordered == [0, 1, 2, 3]

    def test_restart_from_the_first_pair(self):
        plan = plan_of([24], global_batch_size=4, epochs=2, start=Position(5, 0, 0))
        fresh = plan_of([24], global_batch_size=4, epochs=2)
        assert plan.num_steps == 17 and plan.pairs(5).tolist() == fresh.pairs(0).tolist()
        with pytest.raises(IndexError, match=r"step 4 is not in this plan \(steps 5 to 16\)"):
            plan.pairs(4)

    def test_fewer_epochs_than_completed_leave_no_steps(self):
        done = plan_of([24], global_batch_size=4, epochs=3).position(14)
        assert done == Position(14, 2, 8)
        assert plan_of([24], global_batch_size=4, epochs=2, start=done).num_steps == 12
        assert plan_of([24], global_batch_size=4, epochs=3, start=Position(18, 3, 0)).num_steps == 18

    def test_digest_depends_on_every_setting_of_the_steps(self):
        settings = [{}, {"seed": 1}, {"shuffle": False}, {"global_batch_size": 4}, {"epochs": 2}]
        digests = [plan_of([24], **one).digest for one in [*settings, {"start": Position(1, 0, 8)}]]
        assert len(set(digests)) == 6 and plan_of([24]).digest == digests[0]


class TestIntervals:
    @given(
        size=st.integers(1, 60),
        batch=st.integers(1, 20),
        epochs=st.integers(1, 3),
        interval=st.sampled_from(["0.1", "0.25", "0.3", "0.5", "1", "1.5", "2"]),
    )
    @settings(deadline=None)
    def test_parts_of_an_epoch(self, size, batch, epochs, interval):
        """Check that an event is due after each step that reaches or passes a multiple of the interval.

        The interval is a number of epochs.
        """
        plan = plan_of([size], global_batch_size=batch, epochs=epochs)
        due = [step for step in range(1, plan.num_steps + 1) if plan.due(step, Fraction(interval))]
        twentieths = round(20 * float(interval))  # the interval in twentieths of an epoch
        multiples = range(0, 20 * size * epochs + 1, twentieths * size)  # in twentieths of a pair
        expected, done = [], 0
        for step in range(1, plan.num_steps + 1):
            before, done = done, done + len(plan.pairs(step - 1))
            if any(20 * before < multiple <= 20 * done for multiple in multiples):
                expected.append(step)
        assert due == expected
        assert interval != "1" or due == [plan.steps_per_epoch * (epoch + 1) for epoch in range(epochs)]

    def test_another_batch_size_after_resuming(self):
        """A quarter of an epoch is 2.5 of 10 pairs. The first two steps use 3 pairs each. Later steps use 2 each."""
        first = plan_of([10], global_batch_size=3, epochs=2)
        plan = plan_of([10], global_batch_size=2, epochs=2, start=first.position(2))
        assert [step for step in (1, 2) if first.due(step, Fraction("0.25"))] == [1, 2]  # after 3 and 6 pairs
        # Steps 3 to 9 end after 8, 10 (the end of the epoch), 12, 14, 16, 18 and 20 pairs.
        due = [step for step in range(3, plan.num_steps + 1) if plan.due(step, Fraction("0.25"))]
        assert due == [3, 4, 6, 7, 8, 9]

    def test_steps(self):
        plan = plan_of([10], global_batch_size=1)
        assert [step for step in range(1, 11) if plan.due(step, 4)] == [4, 8]
        assert not any(plan.due(step, 0) for step in range(1, 11))
