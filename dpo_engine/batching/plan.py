"""Plan which pairs each optimizer step uses and, in layout `stacked`, which data-parallel rank processes each pair.

Every rank computes the same plan, so the ranks do not need to communicate. In layout `tree`,
:mod:`~dpo_engine.batching.packing` assigns the pairs of a step to ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np


class Pairs(Protocol):
    """The facts about a data set that a plan needs: its size, and the source and the prompt hash of each pair."""

    source_ids: np.ndarray
    prompt_keys: np.ndarray

    def __len__(self) -> int: ...


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool = True, source: int = 0) -> np.ndarray:
    """Return a permutation of `range(n)` that depends only on the arguments.

    Each number is assigned 64 random bits as its sort key. numpy guarantees that the generator returns the same bits in
    all versions and on all machines. Without `shuffle`, the order is 0, 1, ..., n - 1.
    """
    if not shuffle:
        return np.arange(n)
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, source])).random_raw(n)
    return np.argsort(keys, kind="stable")


def draws_per_source(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return the number of pairs of each source in an epoch: `sum(sizes)` in total, proportional to weight x size.

    Numbers are rounded by the largest remainder method. Of sources with equal remainders, the earlier ones are rounded
    up first. If all weights are equal, the result is `sizes`.
    """
    shares = [Fraction(weight) * size for weight, size in zip(weights, sizes, strict=True)]
    exact = [sum(sizes) * share / sum(shares) for share in shares]
    draws = [int(share) for share in exact]
    left_over = sorted(range(len(draws)), key=lambda k: (draws[k] - exact[k], k))
    for k in left_over[: sum(sizes) - sum(draws)]:
        draws[k] += 1
    return draws


def blended_order(
    source_ids: np.ndarray,
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    prompts: np.ndarray | None = None,
) -> np.ndarray:
    """Return the pairs of one epoch in order, from several weighted sources.

    1. An epoch has as many draws as there are pairs. :func:`draws_per_source` divides the draws among the sources.
    2. Each source is an endless sequence of permutations of its pairs (:func:`epoch_order`). An epoch continues the
       sequence where the previous epoch stopped. Every pair of a source is therefore drawn once before any pair is
       drawn again.
    3. The draws from all sources are interleaved evenly: if a source has d draws, its draw j (from 0) is placed at the
       fraction (j + 1/2) / d of the epoch. Every part of an epoch therefore contains a proportional number of
       draws from each source, to within about one draw.

    Without `shuffle`, step 2 keeps the order of each source's pairs (with `prompts`, the order in which the prompts
    first occur), and step 3 appends one source after the other.

    With equal weights, every pair occurs exactly once per epoch.

    source_ids  [n]  source of each pair
    weights          weight of each source, > 0
    prompts     [n]  prompt hashes. If given, step 2 makes pairs with equal hashes adjacent

    Returns  [n]  indices of pairs
    """
    rows = [np.flatnonzero(source_ids == k) for k in range(len(weights))]
    draws = draws_per_source([len(own) for own in rows], weights)
    order, places = [], []
    for k, (own, count) in enumerate(zip(rows, draws, strict=True)):
        if count == 0:
            continue
        start, stop = epoch * count, (epoch + 1) * count
        for cycle in range(start // len(own), -(-stop // len(own))):
            permutation = own[_source_order(own, prompts, seed=seed, epoch=cycle, shuffle=shuffle, source=k)]
            first = cycle * len(own)
            order.append(permutation[max(start - first, 0) : stop - first])
        places.append((np.arange(count) + 0.5) / count)
    indices = np.concatenate(order)
    return indices[np.argsort(np.concatenate(places), kind="stable")] if shuffle else indices


def _source_order(own: np.ndarray, prompts: np.ndarray | None, **order: Any) -> np.ndarray:
    """Return a permutation of a source's pairs. With `prompts`, pairs with the same prompt stay together."""
    if prompts is None:
        return epoch_order(len(own), **order)
    _, first, prompt = np.unique(prompts[own], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)[epoch_order(len(first), **order)]] = np.arange(len(first))
    return np.argsort(rank[prompt], kind="stable")


def deal(indices: np.ndarray, *, dp_rank: int, dp_size: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the micro-batches of one data-parallel rank for a global batch.

    Rank r takes `indices[r::dp_size]`. If the micro-batches have room for more pairs, the remaining places are -1.

    indices   [n]  pairs in the global batch
    sizes     sizes of a rank's micro-batches, in pairs; their sum is at least the rank's number of pairs

    Returns  an array of pairs for each size; over all ranks, each pair occurs once
    """
    mine = np.full(sum(sizes), -1, dtype=np.int64)
    own = np.asarray(indices)[dp_rank::dp_size]
    mine[: len(own)] = own
    return np.split(mine, np.cumsum(sizes)[:-1])


class Position(NamedTuple):
    """Position in the data after `step` steps: the next pair is at index `pair` in the order of epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    pair: int = 0


START = Position()


class Plan:
    """The pairs for each optimizer step of a run, from `start` on.

    The pairs of a step depend on neither the layout nor the number of ranks.

    steps_per_epoch  number of steps in a full epoch; the last step uses the remaining pairs, at least one
    num_steps        total number of steps, including the steps before `start`: the steps until `epochs` epochs are
                     done, or `max_steps` if that is less
    """

    def __init__(
        self,
        dataset: Pairs,
        *,
        weights: Sequence[float] | None = None,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int = 1,
        max_steps: int | None = None,
        group_by_prompt: bool = False,
        start: Position = START,
    ):
        self.source_ids = dataset.source_ids
        self.prompts = dataset.prompt_keys if group_by_prompt else None
        self.weights = [1.0] * (int(self.source_ids.max()) + 1) if weights is None else list(weights)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = -(-len(dataset) // global_batch_size)
        self.start = start
        self._first = -(-(len(dataset) - start.pair) // global_batch_size)  # remaining steps of the first epoch
        every = start.step + self._first + (epochs - start.epoch - 1) * self.steps_per_epoch
        self.num_steps = every if max_steps is None else min(every, max_steps)
        self._orders: dict[int, np.ndarray] = {}  # at most two: adjacent steps can be in different epochs

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the pairs of an epoch, in order, [n]."""
        orders = self._orders  # the dictionary is replaced, never changed, because two threads use a plan
        if epoch not in orders:
            order = blended_order(
                self.source_ids,
                self.weights,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                prompts=self.prompts,
            )
            self._orders = orders = {**dict(list(orders.items())[-1:]), epoch: order}
        return orders[epoch]

    def pairs(self, step: int) -> np.ndarray:
        """Return the pairs in the global batch of a step: [global_batch_size], or fewer at the end of an epoch.

        step  number of steps done before this step, at least `start.step`

        Raises `IndexError` if the step is not part of the plan.
        """
        if not self.start.step <= step < self.num_steps:
            raise IndexError(f"step {step} is not in this plan (steps {self.start.step} to {self.num_steps - 1})")
        _, epoch, pair = self.position(step)
        return self.epoch(epoch)[pair : pair + self.global_batch_size]

    def position(self, step: int) -> Position:
        """Return the position in the data after `step` steps. A plan with this position as `start` continues there."""
        done = step - self.start.step
        if done < self._first:
            return Position(step, self.start.epoch, self.start.pair + done * self.global_batch_size)
        epochs, place = divmod(done - self._first, self.steps_per_epoch)
        return Position(step, self.start.epoch + 1 + epochs, place * self.global_batch_size)

    def epochs_done(self, step: int) -> Fraction:
        """Return the number of epochs that are done after `step` steps, such as 5/4."""
        _, epoch, pair = self.position(step)
        return epoch + Fraction(pair, len(self.source_ids))

    def due(self, step: int, interval: int | Fraction) -> bool:
        """Return whether an event that recurs at an interval is due after `step` steps.

        interval  number of steps, or 0 for never. A `Fraction` is a number of epochs; the event is due after each step
                  that reaches or passes a multiple of this number
        """
        if isinstance(interval, int):
            return interval > 0 and step % interval == 0
        return self.epochs_done(step) // interval > self.epochs_done(step - 1) // interval

    @cached_property
    def digest(self) -> str:
        """Hash of the pairs' order in the plan's first epoch, and of the settings that divide the pairs into steps."""
        digest = hashlib.blake2b(f"{self.start} {self.global_batch_size} {self.num_steps}".encode(), digest_size=16)
        digest.update(self.epoch(self.start.epoch).astype("<i8").tobytes())
        return digest.hexdigest()
