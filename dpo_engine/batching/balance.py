"""Balance load: assign items with costs to bins so that the total cost of the most expensive bin is small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLOSE = 1024
PRECISION = 40


def deal_evenly(
    costs: Sequence[int] | np.ndarray, count: int, *, sizes: np.ndarray | None = None, capacity: int = 0
) -> np.ndarray | None:
    """Assign items to `count` bins so that the largest total cost of a bin is small.

    1. Take the items in order of decreasing cost, and items with equal costs in order of decreasing size. Of the bins
       with enough room for an item, put the item into the bin with the lowest total cost.
    2. If step 1 found no room for an item, start again: take the items in order of decreasing size, and items with
       equal sizes in order of decreasing cost. Put each item into the fullest bin that still has enough room for it.
    3. Move an item from the most expensive bin to another bin, or exchange it with an item from another bin. Choose the
       move or exchange after which the larger cost of these two bins is smallest. Repeat this step, but do it at most n
       times. Stop earlier if no move or exchange makes both bins cheaper than the most expensive bin is now, or if the
       cost of the most expensive bin exceeds the mean by at most 1 / `CLOSE` of the mean.

    If several choices are equally good, the choice with the lowest index is taken, so the result is deterministic.

    costs     [n]  cost of each item, >= 0
    sizes     [n]  size of each item, at most `capacity`; None means that bins can contain any number of items
    capacity       size of each bin

    Returns  the bin of each item, [n] int64; None if neither step 1 nor step 2 finds room for all items

    Source: Graham, "Bounds on Multiprocessing Timing Anomalies" (1969), for step 1.
    """
    # Use integers: their sums do not depend on the order of additions, so all machines compute the same assignment.
    costs = np.asarray(costs, dtype=np.float64)
    costs = np.rint(costs / (costs.max(initial=0.0) or 1.0) * 2**PRECISION).astype(np.int64)
    if sizes is None:
        sizes = np.zeros(len(costs), dtype=np.int64)
    bins = _cheapest_bin_first(costs, sizes, count, capacity)
    if bins is None:
        bins = _fullest_bin_first(costs, sizes, count, capacity)
    return bins if bins is None else _exchange(bins, costs, sizes, count, capacity)


def _cheapest_bin_first(costs: np.ndarray, sizes: np.ndarray, count: int, capacity: int) -> np.ndarray | None:
    bins = np.empty(len(costs), dtype=np.int64)
    loads, room = np.zeros(count, dtype=np.int64), np.full(count, capacity)
    for item in np.lexsort((-sizes, -costs)):
        open_bins = np.flatnonzero(room >= sizes[item])
        if not len(open_bins):
            return None
        chosen = open_bins[loads[open_bins].argmin()]
        bins[item] = chosen
        loads[chosen] += costs[item]
        room[chosen] -= sizes[item]
    return bins


def _fullest_bin_first(costs: np.ndarray, sizes: np.ndarray, count: int, capacity: int) -> np.ndarray | None:
    bins = np.empty(len(costs), dtype=np.int64)
    room = np.full(count, capacity)
    for item in np.lexsort((-costs, -sizes)):
        open_bins = np.flatnonzero(room >= sizes[item])
        if not len(open_bins):
            return None
        chosen = open_bins[room[open_bins].argmin()]
        bins[item] = chosen
        room[chosen] -= sizes[item]
    return bins


def _exchange(bins: np.ndarray, costs: np.ndarray, sizes: np.ndarray, count: int, capacity: int) -> np.ndarray:
    """Do step 3 of :func:`deal_evenly`: repeatedly apply the best move or exchange for the most expensive bin."""
    loads, room = np.zeros(count, dtype=np.int64), np.full(count, capacity)
    np.add.at(loads, bins, costs)
    np.subtract.at(room, bins, sizes)
    close = costs.sum() // count + costs.sum() // count // CLOSE
    for _ in range(len(costs)):
        dearest = loads.argmax()
        if loads[dearest] <= close:
            break
        own, others = np.flatnonzero(bins == dearest), np.flatnonzero(bins != dearest)
        # An item of the most expensive bin can be exchanged for an item of another bin, or moved to another bin.
        from_bin = np.append(bins[others], np.arange(count))
        cost = costs[own][:, None] - np.append(costs[others], np.zeros(count, np.int64))
        size = sizes[own][:, None] - np.append(sizes[others], np.zeros(count, np.int64))
        dearer = np.maximum(loads[dearest] - cost, loads[from_bin] + cost)
        fits = (size <= room[from_bin]) & (-size <= room[dearest])
        dearer[~fits] = loads[dearest]
        give, take = np.unravel_index(dearer.argmin(), dearer.shape)
        if dearer[give, take] >= loads[dearest]:
            break
        other = from_bin[take]
        bins[own[give]] = other
        if take < len(others):
            bins[others[take]] = dearest
        loads[[dearest, other]] += np.array([-1, 1]) * cost[give, take]
        room[[dearest, other]] += np.array([1, -1]) * size[give, take]
    return bins
