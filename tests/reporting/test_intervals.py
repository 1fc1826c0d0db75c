"""Tests of the sign test and of confidence intervals.

The interval of a mean is a bootstrap interval. The interval of a share, or of the difference between two shares, is the
bootstrap interval, widened to contain the exact interval.
"""

import itertools
import math

import numpy as np
import pytest

from dpo_engine.reporting.intervals import DIFFERENCE, SHARE, estimates, sign_test


def one(values, weights=None, prompts=None, **settings):
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights)
    prompts = np.arange(len(values)) if prompts is None else np.asarray(prompts)
    return estimates(values[:, None], weights, prompts, **settings)[0]


def test_small_sample_matches_the_exact_distribution():
    """Compare the bootstrap interval with the interval from all 4^4 weighted resamples of four pairs."""
    values, weights = np.array([0.0, 1.0, 0.5, 3.0]), np.array([1.0, 2.0, 0.5, 1.0])
    drawn = np.array(list(itertools.product(range(4), repeat=4)))
    exact = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    found = one(values, weights, resamples=40_000)
    assert found.mean == pytest.approx((values * weights).sum() / weights.sum())
    expected = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert [found.low, found.high] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("weighted", [False, True])
def test_large_sample_matches_the_normal_interval(weighted):
    rng = np.random.default_rng(1)
    values = rng.normal(2.0, 3.0, size=4000)
    weights = rng.choice([0.5, 1.0, 4.0], size=4000) if weighted else np.ones(4000)
    found = one(values, weights)
    mean = np.average(values, weights=weights)
    error = np.sqrt((weights**2 * (values - mean) ** 2).sum()) / weights.sum()  # linearized standard error of a ratio
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.12 * error)


def test_intervals_have_their_nominal_coverage():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        found = one(rng.random(100) < 0.7, resamples=300)
        hits += found.low <= 0.7 <= found.high
    assert 0.91 <= hits / 300 <= 0.98


def test_pairs_of_a_prompt_are_resampled_together():
    """Copies of a pair add no evidence if they have the same prompt, and the order of pairs does not matter.

    If every copy has its own prompt, the interval becomes narrower.
    """
    rng = np.random.default_rng(3)
    values, prompts = rng.normal(size=50), np.array([f"p{i:02d}" for i in range(50)])
    expected = one(values, prompts=prompts)
    assert one(np.repeat(values, 5), prompts=np.repeat(prompts, 5)) == pytest.approx(expected)
    assert one(values[::-1], prompts=prompts[::-1]) == pytest.approx(expected)
    apart = one(np.repeat(values, 5))
    assert apart.high - apart.low < 0.6 * (expected.high - expected.low)


def test_columns_share_their_resamples_and_the_seed_fixes_them():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(30, 2))
    values = np.column_stack([values, values[:, 0] - values[:, 1]])
    weights = rng.random(30) + 0.1
    first = estimates(values, weights, np.arange(30))
    assert first == estimates(values, weights, np.arange(30))
    assert first != estimates(values, weights, np.arange(30), seed=1)
    assert first[2].mean == pytest.approx(first[0].mean - first[1].mean)
    alone = one(values[:, 2], weights)
    assert tuple(first[2]) == pytest.approx(tuple(alone))


def tail(hits, count, share):
    """Return the binomial probability of at least `hits` hits in `count` trials, each with probability `share`."""
    return sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits, count + 1))


@pytest.mark.parametrize(("hits", "count"), [(255, 255), (251, 255), (0, 12), (7, 10)])
def test_intervals_of_shares_contain_the_exact_ones(hits, count):
    """The interval of a share contains its bootstrap interval and its exact interval (Clopper-Pearson).

    Suppose that the true share equals the lower bound of the exact interval. Then a new sample has at least `hits` hits
    with a probability of 2.5%. If the true share equals the upper bound instead, a new sample has at most `hits` hits
    with a probability of 2.5%. If there are no hits, the lower bound is 0. If there are only hits, the upper bound
    is 1.
    """
    values = np.arange(count) < hits
    found, bootstrap = one(values, centers=[SHARE]), one(values)
    assert found.low <= bootstrap.low and found.high >= bootstrap.high
    assert found.low == pytest.approx(0, abs=1e-9) if hits == 0 else tail(hits, count, found.low) <= 0.025 + 1e-9
    assert found.high == pytest.approx(1) if hits == count else 1 - tail(hits + 1, count, found.high) <= 0.025 + 1e-9
    if hits == count:
        assert found.low == pytest.approx(0.025 ** (1 / count)) and bootstrap.low == 1
    if hits == 0:
        assert found.high == pytest.approx(1 - 0.025 ** (1 / count)) and bootstrap.high == 0


@pytest.mark.parametrize(("better", "worse"), [(4, 0), (5, 0), (6, 0), (9, 1), (9, 2), (1, 8), (3, 3), (0, 0)])
def test_few_pairs_that_differ(better, worse):
    """A difference's 95% interval excludes 0 if and only if McNemar's exact test is significant at the 5% level."""
    values = np.zeros(255)
    values[:better], values[better : better + worse] = 1, -1
    p = sign_test(values, np.ones(255), np.arange(255))
    assert p == pytest.approx(min(1, 2 * tail(max(better, worse), better + worse, 0.5)))
    found = one(values, centers=[DIFFERENCE])
    assert (found.low > 0 or found.high < 0) == (p < 0.05)
    assert found.low <= found.mean <= found.high


def test_exact_intervals_count_prompts():
    """Copies of a pair add no evidence if they have the same prompt.

    In the sign test, opposite values of the same prompt cancel.
    """
    values, prompts = np.ones(20), np.arange(20)
    expected = one(values, centers=[SHARE])
    assert one(np.repeat(values, 5), prompts=np.repeat(prompts, 5), centers=[SHARE]) == pytest.approx(expected)
    apart = one(np.repeat(values, 5), centers=[SHARE])
    assert apart.low > expected.low
    assert sign_test(np.repeat(values, 5), np.ones(100), np.repeat(prompts, 5)) == pytest.approx(2 * 0.5**20)
    weights = np.array([0.1, 0.2, 0.3])
    assert sign_test(np.array([1.0, 1.0, -1.0]), weights, np.zeros(3)) == 1, "rounding errors must not count"
    assert one([0.5] * 9, centers=[SHARE]) == (0.5, 0.5, 0.5), "ties must favor neither direction"
