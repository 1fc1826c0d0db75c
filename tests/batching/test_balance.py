"""Tests of distributing items evenly over bins: each item is in one bin, and loads stay within the proven bounds."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_engine.batching.balance import deal_evenly

COSTS = st.lists(st.integers(0, 10**15), min_size=1, max_size=40)


@given(costs=COSTS, count=st.integers(1, 9))
def test_each_item_is_assigned_once_and_loads_are_bounded(costs, count):
    bins = deal_evenly(costs, count)
    assert len(bins) == len(costs) and set(bins) <= set(range(count))
    loads = [sum(cost for cost, b in zip(costs, bins, strict=True) if b == k) for k in range(count)]
    assert max(loads) * count <= (sum(costs) + (count - 1) * max(costs)) * (1 + 1e-9)
    assert bins.tolist() == deal_evenly(np.array(costs), count).tolist()


@settings(deadline=None, max_examples=60)
@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=7), count=st.integers(1, 3))
def test_largest_load_is_within_grahams_bound_of_the_optimum(costs, count):
    best = min(
        max(sum(c for c, b in zip(costs, deal, strict=True) if b == k) for k in range(count))
        for deal in itertools.product(range(count), repeat=len(costs))
    )
    assert np.bincount(deal_evenly(costs, count), costs).max() <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


@given(
    items=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 30)), min_size=1, max_size=30),
    count=st.integers(1, 12),
)
def test_capacity_is_respected(items, count):
    costs, sizes = map(np.array, zip(*items, strict=True))
    bins = deal_evenly(costs, count, sizes=sizes, capacity=30)
    if bins is None:
        # Placing the largest items first always succeeds if the items fill at most half of the total capacity.
        assert sizes.sum() > 15 * count
    else:
        assert np.bincount(bins, sizes, minlength=count).max() <= 30


def test_by_hand():
    # Placing the most expensive items first gives 3 2 2 | 3 2. Exchanging a 3 for a 2 then gives 2 2 2 | 3 3.
    assert np.bincount(deal_evenly([3, 3, 2, 2, 2], 2), [3, 3, 2, 2, 2]).tolist() == [6, 6]
    # If items were placed in order of cost alone, no bin would have room for the last item, which is large but cheap.
    assert deal_evenly([9, 8, 1], 2, sizes=np.array([1, 1, 4]), capacity=4).tolist() == [1, 1, 0]
    assert deal_evenly([9, 8, 1], 2, sizes=np.array([3, 3, 4]), capacity=4) is None
    # With equal costs, items with lower indices go to bins with lower indices.
    assert deal_evenly([5, 5, 5], 3).tolist() == [0, 1, 2]
    assert deal_evenly([], 2).tolist() == [] and deal_evenly([0, 0], 1).tolist() == [0, 0]
