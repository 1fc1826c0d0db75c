"""Estimate weighted means with confidence intervals, by a bootstrap that resamples prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0


class Estimate(NamedTuple):
    """A weighted mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def estimates(
    values: np.ndarray, weights: np.ndarray, prompts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Estimate]:
    """Estimate the weighted mean of each column, with a percentile interval. All columns use the same resamples.

    values   [n, c]  one row per pair
    weights  [n]     weight of each pair, > 0
    prompts  [n]     equal for pairs that share a prompt

    The bootstrap draws prompts with replacement, and takes all pairs of each drawn prompt. Pairs with the same prompt
    are correlated, so drawing single pairs would make the intervals too narrow. If every prompt has one pair, drawing
    prompts is the same as drawing pairs.

    Returns  c estimates, one per column; the same arguments give the same estimates

    Source: Efron, Bootstrap Methods: Another Look at the Jackknife (1979). For clusters: Davison and Hinkley, Bootstrap
    Methods and Their Application (1997), section 3.8.
    """
    _, prompt = np.unique(prompts, return_inverse=True)
    count = int(prompt.max()) + 1
    parts = [weights, *(weights * values.T)]
    sums = np.stack([np.bincount(prompt, part, minlength=count) for part in parts], axis=1)  # [prompts, 1 + c]
    generator = np.random.default_rng(seed)
    totals = np.empty((resamples, sums.shape[1]))
    for place in range(resamples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        totals[place] = drawn @ sums
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(totals[:, 1:] / totals[:, :1], [tail, 1 - tail], axis=0)  # [c]
    total = sums.sum(0)
    return [Estimate(*map(float, ends)) for ends in zip(total[1:] / total[0], low, high, strict=True)]
