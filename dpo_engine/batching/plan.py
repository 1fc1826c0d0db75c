"""Which pairs make which optimiser step, and which data-parallel rank takes them. Pure functions of their arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np


class Pairs(Protocol):
    """What a plan asks of a data set: its size, and the file and a hash of the prompt of each pair, [n] both."""

    source_ids: np.ndarray
    prompt_keys: np.ndarray

    def __len__(self) -> int: ...


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool = True, source: int = 0) -> np.ndarray:
    """A permutation of `range(n)`, decided by (n, seed, epoch, source) and nothing else.

    The numbers are sorted by 64 random bits each, from a generator whose stream numpy keeps the same across versions
    and machines. Without `shuffle` they stay as they are.
    """
    if not shuffle:
        return np.arange(n)
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, source])).random_raw(n)
    return np.argsort(keys, kind="stable")


def draws_per_source(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many pairs of an epoch each source gives: `sum(sizes)` in all, in proportion to weight times size.

    Rounded by largest remainder, the earlier source first among equals. Equal weights give exactly `sizes`.
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
    """The pairs of one epoch in their order, from several sources with weights.

    1. An epoch has as many draws as there are pairs. Each source gives its part of them: :func:`draws_per_source`.
    2. Each source is an endless sequence: one permutation of its pairs (:func:`epoch_order`) after the other. An epoch
       goes on where the last one stopped, so each pair of a source is drawn before any is drawn again.
    3. The draws of the sources are interleaved evenly: draw j of the d draws of a source stands at (j + 1/2) / d of
       the epoch. Every stretch of the epoch then has each source's share to within a draw or so.

    Without `shuffle`, 2 uses the order of the files and 3 puts source after source.

    Equal weights are plain concatenation: each pair exactly once an epoch, without `shuffle` in the order of the files.

    source_ids  [n]  source of each pair
    weights          of each source, > 0
    prompts     [n]  equal for pairs of one prompt, which then follow each other in 2; None: they may lie anywhere

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
    """A permutation of a source's pairs; of whole prompts, in the order of their first pairs without `shuffle`."""
    if prompts is None:
        return epoch_order(len(own), **order)
    _, first, prompt = np.unique(prompts[own], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)[epoch_order(len(first), **order)]] = np.arange(len(first))
    return np.argsort(rank[prompt], kind="stable")


def deal(
    indices: np.ndarray, *, dp_rank: int, dp_size: int, micro_batch_size: int, multiple: int = 1
) -> list[np.ndarray]:
    """The micro-batches that one data-parallel rank takes of a global batch.

    Rank r takes `indices[r::dp_size]`. All ranks get the same number of micro-batches, the least multiple of `multiple`
    that holds all pairs; places behind a rank's last pair are -1.

    indices   [n]  pairs of the global batch
    multiple       the number of micro-batches must be divisible by this (pipeline stages, when interleaved)

    Returns  arrays [micro_batch_size]; over all ranks each pair occurs once
    """
    count = -(-len(indices) // (micro_batch_size * dp_size))
    count = -(-count // multiple) * multiple
    mine = np.full(count * micro_batch_size, -1, dtype=np.int64)
    own = np.asarray(indices)[dp_rank::dp_size]
    mine[: len(own)] = own
    return list(mine.reshape(count, micro_batch_size))


class Position(NamedTuple):
    """Where a run is in its data after `step` steps: the next pair is number `pair` of the order of `epoch`."""

    step: int = 0
    epoch: int = 0
    pair: int = 0


START = Position()


class Plan:
    """The optimiser steps of a run from `start` on: which pairs each of them takes, whatever the layout.

    steps_per_epoch  the last one of an epoch takes what is left, fewer than `global_batch_size` pairs, never none
    num_steps        to the end of `epochs` epochs, or fewer steps when `max_steps` comes first
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
        self._first = -(-(len(dataset) - start.pair) // global_batch_size)  # steps of the epoch that is begun
        every = start.step + self._first + (epochs - start.epoch - 1) * self.steps_per_epoch
        self.num_steps = every if max_steps is None else min(every, max_steps)
        self._epoch: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch in their order [n]."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = blended_order(
                self.source_ids,
                self.weights,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                prompts=self.prompts,
            )
            self._epoch = epoch, order
        return self._epoch[1]

    def pairs(self, step: int) -> np.ndarray:
        """The pairs of the global batch of a step, from 0: [global_batch_size], or fewer at the end of an epoch.

        Raises `IndexError` beyond the last step.
        """
        if not self.start.step <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        _, epoch, pair = self.position(step)
        return self.epoch(epoch)[pair : pair + self.global_batch_size]

    def position(self, step: int) -> Position:
        """Where the run is in its data when `step` steps are done: what a plan that goes on from there starts with."""
        done = step - self.start.step
        if done < self._first:
            return Position(step, self.start.epoch, self.start.pair + done * self.global_batch_size)
        epochs, place = divmod(done - self._first, self.steps_per_epoch)
        return Position(step, self.start.epoch + 1 + epochs, place * self.global_batch_size)

    @property
    def digest(self) -> str:
        """Hash of the pairs' order in the epoch that is begun, and of what cuts it into steps."""
        digest = hashlib.blake2b(f"{self.start} {self.global_batch_size} {self.num_steps}".encode(), digest_size=16)
        digest.update(self.epoch(self.start.epoch).astype("<i8").tobytes())
        return digest.hexdigest()
