"""Tests that metrics match their definitions, and that sources and metrics have the expected names."""

import math
import statistics

import numpy as np
import pytest
import torch

from dpo_engine.objective.losses import PairLogps
from dpo_engine.training.metrics import Reported, means, pair_sums, source_names

CHOSEN, REJECTED = [-4.0, -9.0, -1.0, -2.5, 7.0], [-6.0, -7.0, -3.0, -2.0, 9.0]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-5.0, -8.0, -1.0, -2.5, 7.0], [-5.0, -9.0, -3.5, -1.0, 9.0]
LENGTHS = [2.0, 3.0, 5.0, 1.0, 0.0], [4.0, 7.0, 11.0, 2.0, 0.0]
ENTROPY = [3.0, 4.5, 9.0, 0.5, 0.0], [5.0, 7.0, 10.0, 2.5, 0.0]
REWARDS = [0.3, -0.3, 0.0, 0.1, 5.0], [-0.2, 0.5, 0.0, -0.7, 6.0]
LOSSES = [0.25, 0.75, 0.5, 1.5, 8.0]
WEIGHTS = [0.5, 2.0, 1.0, 1.5, 0.0]  # the last pair is a dummy
SOURCE = [1, 1, 0, 1, 0]
PAIRS = range(4)


def metrics_of(
    parts=(slice(None),), *, reference=True, entropy=False, sources=("only",), averages=False, tolerance=0.0
) -> dict[str, float]:
    """Return the metrics of the pairs above, computed from sums over the micro-batches ``parts``."""
    known = Reported(reference=reference, entropy=entropy, sources=sources, averages=averages)
    total = 0
    for part in parts:

        def column(values, part=part):
            return torch.tensor(values)[part]

        entropies = [None, None, *map(column, ENTROPY)] if entropy else []
        policy = PairLogps(*map(column, (CHOSEN, REJECTED, *LENGTHS)), *entropies)
        against = PairLogps(*map(column, (REFERENCE_CHOSEN, REFERENCE_REJECTED, *LENGTHS))) if reference else None
        sums = pair_sums(
            known,
            column(LOSSES),
            tuple(map(column, REWARDS)),
            policy,
            against,
            column(WEIGHTS),
            column(SOURCE),
            tolerance=tolerance,
        )
        assert sums.dtype is torch.float64 and sums.shape == (sum(known.sizes),)
        total = total + sums
    return means(total, known, sum(WEIGHTS))


def mean(values, pairs=PAIRS) -> float:
    return sum(WEIGHTS[i] * values[i] for i in pairs) / sum(WEIGHTS[i] for i in pairs)


def spread(values) -> float:
    return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))


def likely() -> dict[str, float]:
    def share(chosen, rejected):
        return mean([1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)])

    sides = zip((CHOSEN, REJECTED), LENGTHS, strict=True)
    each = [[value / max(count, 1) for value, count in zip(*side, strict=True)] for side in sides]
    return {"likelihood/accuracies": share(CHOSEN, REJECTED), "likelihood/accuracies_per_token": share(*each)}


def of_pairs() -> dict[str, float]:
    (chosen, rejected), margins = REWARDS, [c - r for c, r in zip(*REWARDS, strict=True)]
    return {
        "loss": mean(LOSSES),
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean([1.0, 0.0, 0.5, 1.0]),
        "logps/chosen": mean(CHOSEN),
        "logps/rejected": mean(REJECTED),
        **likely(),
        "sft_loss": mean([-CHOSEN[i] / LENGTHS[0][i] for i in PAIRS]),
        "rewards/chosen_std": spread(chosen),
        "rewards/rejected_std": spread(rejected),
        "rewards/margins_std": spread(margins),
    }


def displaced() -> dict[str, float]:
    return {
        "displacement/chosen": mean([1.0, -1.0, 0.0, 0.0]),
        "displacement/rejected": mean([-1.0, 2.0, 0.5, -1.0]),
        "displacement/chosen_fell": mean([0.0, 1.0, 0.5, 0.5]),
    }


MICRO_BATCHES = {"one": (slice(None),), "ragged": (slice(0, 1), slice(1, 3), slice(3, 5))}


@pytest.mark.parametrize("parts", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_every_metric_matches_its_definition(parts):
    assert metrics_of(parts) == pytest.approx({**of_pairs(), **displaced()}, rel=1e-6)


def test_margin_of_a_loss_that_averages():
    margins = [c / max(n, 1) - r / max(m, 1) for c, r, n, m in zip(*REWARDS, *LENGTHS, strict=True)]
    expected = {"loss_margin/mean": mean(margins), "loss_margin/accuracies": mean([1.0, 0.0, 0.5, 1.0])}
    assert metrics_of(averages=True) == pytest.approx({**of_pairs(), **displaced(), **expected}, rel=1e-6)


def test_averages_and_sums_can_disagree():
    """The chosen reward is larger than the rejected reward in total (1.0 > 0.5), but smaller per token (0.1 < 0.5)."""
    one = torch.ones(1)
    policy = PairLogps(-one, -one, 10 * one, one)
    known = Reported(reference=False, entropy=False, sources=("only",), averages=True)
    sums = pair_sums(known, one, (one, 0.5 * one), policy, None, one, torch.zeros(1, dtype=torch.int64))
    got = means(sums, known, 1.0)
    assert got["rewards/accuracies"] == 1 and got["loss_margin/accuracies"] == 0
    assert got["loss_margin/mean"] == pytest.approx(-0.4)


def test_differences_within_the_tolerance_are_ties():
    got = metrics_of(tolerance=0.6)
    assert got["rewards/accuracies"] == pytest.approx(mean([0.5, 0.0, 0.5, 1.0]))
    assert metrics_of(tolerance=torch.ones(5))["displacement/chosen_fell"] == pytest.approx(0.5)


def test_no_displacement_without_a_reference():
    assert metrics_of(reference=False) == pytest.approx(of_pairs(), rel=1e-6)


@pytest.mark.parametrize("parts", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_entropies_are_unweighted_means_over_tokens(parts):
    got = metrics_of(parts, entropy=True)
    expected = {"entropy/chosen": 17.0 / 11, "entropy/rejected": 24.5 / 24}
    assert got == pytest.approx({**of_pairs(), **displaced(), **expected}, rel=1e-6)


@pytest.mark.parametrize("parts", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_each_source_has_its_own_metrics(parts):
    got = metrics_of(parts, sources=("easy", "hard", "absent"))
    expected = {**of_pairs(), **displaced()}
    margins = [c - r for c, r in zip(*REWARDS, strict=True)]
    for name, pairs in {"easy": [2], "hard": [0, 1, 3]}.items():
        expected[f"source/{name}/loss"] = mean(LOSSES, pairs)
        expected[f"source/{name}/rewards/margins"] = mean(margins, pairs)
        expected[f"source/{name}/rewards/accuracies"] = mean([1.0, 0.0, 0.5, 1.0], pairs)
        expected[f"source/{name}/pairs"] = len(pairs)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1.0, -1e3, 1e6])
@pytest.mark.parametrize("wide", [1.0, 1e-3])
def test_standard_deviations_are_accurate_for_large_rewards(size, wide):
    """Rewards can be far from 0 and close together.

    In fp32, the mean of squares minus the squared mean would then lose all digits by cancellation.
    """
    rewards = (size + wide * torch.from_numpy(np.random.default_rng(0).normal(size=4096))).float()
    ones, known = torch.ones(4096), Reported(reference=False, entropy=False, sources=())
    policy = PairLogps(rewards, rewards, ones, ones)
    sums = pair_sums(known, ones, (rewards, torch.zeros(4096)), policy, None, ones, ones.long())
    got = means(sums, known, 4096.0)
    expected = statistics.pstdev(map(float, rewards.tolist()))  # computed in exact rational arithmetic
    assert got["rewards/chosen_std"] == pytest.approx(expected, rel=1e-6, abs=1e-8 * abs(size))
    assert got["rewards/rejected_std"] == 0.0


def test_equal_rewards_have_zero_standard_deviation():
    ones, known = torch.ones(7), Reported(reference=False, entropy=False, sources=())
    rewards = 0.1 * ones
    sums = pair_sums(known, ones, (rewards, rewards), PairLogps(*[ones] * 4), None, 0.3 * ones, ones.long())
    got = means(sums, known, float(7 * (0.3 * ones[0]).double()))
    assert got["rewards/chosen_std"] == got["rewards/margins_std"] == 0.0
    assert got["rewards/accuracies"] == 0.5


def test_source_names_are_distinct_file_stems():
    assert source_names(["a/pairs.jsonl", "b/pairs.jsonl.gz", "pairs_2.parquet", "b/pairs.jsonl.gz"]) == (
        "pairs",
        "pairs_2",
        "pairs_2_2",
        "pairs_3",
    )
    assert source_names(["x/ultra feedback (v1.5).jsonl"]) == ("ultra_feedback__v1.5_",)
    sources = [
        "a/train.jsonl[:-5%]",
        "train.jsonl.zst",
        "shards/*.parquet",
        "**/*.arrow",
        "shards/saved",
        "org/set-1.5@v1:prefs",
    ]
    assert source_names(sources) == ("train", "train_2", "shards", "data", "saved", "set-1.5_v1_prefs")


@pytest.mark.parametrize("reference, entropy, averages", [(True, False, True), (False, True, False)])
def test_names_are_those_of_the_reported_metrics(reference, entropy, averages):
    kinds = {"averages": averages, "parts": ("sigmoid", "ipo") if averages else ()}
    reported = Reported(reference, entropy, sources=("a", "b") if entropy else ("a",), **kinds)
    totals = torch.ones(sum(reported.sizes), dtype=torch.float64)
    assert sorted(reported.names) == sorted(means(totals, reported, 1.0))
