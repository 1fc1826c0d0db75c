"""Items with costs dealt into bins, so that the dearest bin is cheap: what every balance of the engine rests on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLOSE = 1024
PRECISION = 40


def deal_evenly(
    costs: Sequence[int] | np.ndarray, count: int, *, sizes: np.ndarray | None = None, capacity: int = 0
) -> np.ndarray | None:
    """Which of `count` bins each item goes to, so that the largest sum of costs in a bin is small.

    The dearest item first, each to the cheapest bin that has room; where that leaves an item without room, the largest
    item first, each to the bin that it fills best. Then, as long as it helps, the dearest bin gives an item away or
    exchanges one. It ends when the dearest bin is within 1 / `CLOSE` of the mean. Ties go to the lower number.

    costs     [n]  >= 0
    sizes     [n]  room that each item takes, at most `capacity`; None: bins hold any number of items
    capacity       room of a bin

    Returns  bin of each item [n] int64; None when no place was found for an item

    Source: Graham, "Bounds on Multiprocessing Timing Anomalies" (1969), for the first rule.
    """
    # Integers: sums of them are the same in whatever order a processor adds, so unlike machines find the same plan.
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
    """Lower the dearest bin by the best single move or exchange, again and again."""
    loads, room = np.zeros(count, dtype=np.int64), np.full(count, capacity)
    np.add.at(loads, bins, costs)
    np.subtract.at(room, bins, sizes)
    close = costs.sum() // count + costs.sum() // count // CLOSE
    for _ in range(len(costs)):
        dearest = loads.argmax()
        if loads[dearest] <= close:
            break
        own, others = np.flatnonzero(bins == dearest), np.flatnonzero(bins != dearest)
        # What comes back for an own item: one of another bin, or nothing from any of the bins.
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
