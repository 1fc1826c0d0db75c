"""Compute a sign test, and confidence intervals of weighted means: bootstrap and exact binomial intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


SHARE = 0.5
"""Center (middle of the possible values) of a column whose values are 0, 1, or 0.5 for a tie; see :func:`estimates`."""
DIFFERENCE = 0.0
"""Center of a column whose values are differences between two numbers that are each 0, 1, or 0.5."""


def estimates(
    values: np.ndarray,
    weights: np.ndarray,
    prompts: np.ndarray,
    *,
    centers: Sequence[float | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Estimate]:
    """Estimate the weighted mean of each column, with a percentile interval. All columns use the same resamples.

    values   [n, c]  one row per pair
    weights  [n]     weight of each pair, > 0
    prompts  [n]     prompt id of each pair
    centers  [c]     center of each column (the middle of its possible values): :data:`SHARE` or :data:`DIFFERENCE`, or
                     None if the column has other values. Without ``centers``, no column has a center

    The bootstrap draws prompts with replacement, and takes all pairs of each drawn prompt. Pairs with the same prompt
    are correlated, so drawing single pairs would make the intervals too narrow. If every prompt has one pair, drawing
    prompts is the same as drawing pairs.

    Bootstrap intervals are too narrow if nearly all values are equal. For example, the bootstrap interval of 255 values
    that are all 1 is 1 to 1. If four values of a column are positive and all others are 0 (with one pair per prompt),
    the bootstrap interval excludes 0, although the p-value of :func:`sign_test` is 0.125. Intervals of columns with a
    center are therefore widened to contain the exact interval of :func:`_exact_bounds`.

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
    for column, center in enumerate(centers or ()):
        if center is not None:
            ends = _exact_bounds((sums[:, 1 + column] - center * sums[:, 0]) / total[0], center)
            low[column], high[column] = min(low[column], ends[0]), max(high[column], ends[1])
    return [Estimate(*map(float, ends)) for ends in zip(total[1:] / total[0], low, high, strict=True)]


def _exact_bounds(parts: np.ndarray, center: float) -> tuple[float, float]:
    """Return an exact interval of a mean, conditional on the number of prompts whose contribution is not 0.

    parts  [prompts]  contribution of each prompt to the difference between the mean and the center

    The number of positive contributions among those that are not 0 follows a binomial distribution. From the
    Clopper-Pearson interval of its success probability ``p``, this function computes the interval of ``2 p - 1``. The
    latter interval is multiplied by the sum of the absolute contributions and shifted by the center. If every prompt
    has one pair of weight 1, and there are no ties, the result for a fraction is its Clopper-Pearson interval. The
    result for a difference excludes 0 if and only if :func:`sign_test` is below 0.05.

    Source: Clopper and Pearson, The Use of Confidence or Fiducial Limits (1934). For paired differences, conditional on
    the number of pairs that differ: Fagerland, Lydersen and Laake, Recommended Tests and Confidence Intervals for
    Paired Binomial Proportions (2014).
    """
    above, below = _signs(parts)
    low, high = _clopper_pearson(above, above + below)
    size = float(np.abs(parts).sum())
    return center + size * (2 * low - 1), center + size * (2 * high - 1)


def _signs(parts: np.ndarray) -> tuple[int, int]:
    smallest = 1e-9 * np.abs(parts).max(initial=0.0)  # smaller parts are rounding errors
    return int((parts > smallest).sum()), int((parts < -smallest).sum())


def sign_test(values: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> float:
    """Return the two-sided p-value of the hypothesis that a prompt's weighted sum is as often positive as negative.

    values, weights, prompts  [n]  one element per pair, as for :func:`estimates`

    If every prompt has one pair, this is McNemar's exact test of the pairs that differ.

    Source: McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions (1947).
    """
    _, prompt = np.unique(prompts, return_inverse=True)
    above, below = _signs(np.bincount(prompt, weights * values))
    return min(1.0, 2 * _binomial(above + below)(min(above, below), 0.5))


def _clopper_pearson(hits: int, count: int) -> tuple[float, float]:
    """Return the exact interval of the probability of a hit, given `hits` hits in `count` independent trials."""
    below = _binomial(count)
    tail = (1 - CONFIDENCE) / 2
    # At the upper bound of the hit probability `share`, the probability of at most `few` hits is `tail`. The lower
    # bound is 1 minus the upper bound of the probability of a miss.
    upper = [
        1.0 if few == count else _root(lambda share, few=few: below(few, share) - tail) for few in (hits, count - hits)
    ]
    return 1 - upper[1], upper[0]


def _binomial(count: int) -> Callable[[int, float], float]:
    """Return a function of `hits` and `share`: the probability of at most `hits` hits in `count` trials, if each trial
    is a hit with the probability `share`."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    number = np.arange(count + 1)
    ways = logs[-1] - logs - logs[::-1]

    def below(hits: int, share: float) -> float:
        part = slice(hits + 1)
        return float(
            np.exp(ways[part] + number[part] * np.log(share) + (count - number[part]) * np.log1p(-share)).sum()
        )

    return below


def _root(falling: Callable[[float], float]) -> float:
    """Return the root of a decreasing function on [0, 1], by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return 0.5 * (low + high)
