"""Compare the results of runs in two layouts, and the tensors of two checkpoints."""

import math
from pathlib import Path
from typing import Any

import torch

from dpo_engine.testing.trajectory import load_weights


def assert_same_metrics(got: dict[str, float], expected: dict[str, float], rel: float, where: str) -> None:
    """Compare metrics.

    rel   relative tolerance, and also the least absolute tolerance

    Displacements and reward margins are differences, so their absolute tolerance grows with the size of the subtracted
    values. For a displacement, it is at least ``rel`` times the absolute log-probability, which can be near 100 nats.
    For a reward margin, it is at least ``rel`` times the absolute chosen reward.

    If policy and reference have the same weights, their log-probabilities differ only by rounding errors, whose signs
    are arbitrary. ``rewards/accuracies`` and ``displacement/chosen_fell`` depend on these signs, and are then not
    compared.
    """
    assert got.keys() == expected.keys(), f"{where}: metrics {sorted(got)} instead of {sorted(expected)}"
    subtracted = {f"displacement/{side}": abs(expected[f"logps/{side}"]) for side in ("chosen", "rejected")}
    margins = [metric for metric in expected if metric.endswith("rewards/margins")]
    subtracted |= dict.fromkeys(margins, abs(expected["rewards/chosen"]))
    # Even with equal weights, the policy's log-probability can differ from the reference's in the last bit.
    equal = abs(expected.get("rewards/margins", 1.0)) < 1e-16 * abs(expected.get("logps/chosen", 1.0))
    signs = ("rewards/accuracies", "displacement/chosen_fell") if equal else ()
    for metric, value in expected.items():
        if metric.endswith(signs):
            continue
        absolute = rel * max(1.0, subtracted.get(metric, 0.0))
        close = math.isclose(got[metric], value, rel_tol=rel, abs_tol=absolute)
        assert close, f"{where} {metric}: {got[metric]} instead of {value}"


def assert_same_numbers(got: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    """Compare two results of :func:`~dpo_engine.testing.trajectory.train_steps`.

    rel   relative tolerance of the metrics and of the values of each pair. For the values of each pair, the absolute
          tolerance is ``rel`` times the largest absolute log-probability of a chosen response
    """
    for step, (a, b) in enumerate(zip(got["steps"], expected["steps"], strict=True)):
        assert_same_metrics(a, b, rel, f"step {step}")
    assert_same_metrics(got["eval"], expected["eval"], rel, "eval")
    ours, theirs = got["per_pair"], expected["per_pair"]
    assert ours.keys() == theirs.keys() and ours["index"] == theirs["index"] == list(range(5)), "wrong pairs or columns"
    size = max(map(abs, theirs["chosen_logps"]))  # rewards and losses depend on differences of log-probabilities

    def close(one: Any, other: Any) -> bool:
        absent = one != one and other != other
        return one == other or absent or math.isclose(one, other, rel_tol=rel, abs_tol=rel * size)

    for column, values in theirs.items():
        same = all(close(*pair) for pair in zip(ours[column], values, strict=True))
        assert same, f"{column} of the evaluated pairs: {ours[column]} instead of {values}"


def assert_same_weights(
    got_dir: Path | str, expected_dir: Path | str, start_dir: Path | str, rel: float, untrained: tuple[str, ...] = ()
) -> None:
    """Compare exported weights, and check that training has changed all of them except those in ``untrained``.

    rel        relative tolerance of each tensor, in the Euclidean norm
    untrained  prefixes of the names of weights that must not have changed. All other weights must have changed, except
               for ``e_score_correction_bias``, which training never changes
    """
    got, expected, start = (load_weights(d) for d in (got_dir, expected_dir, start_dir))
    assert got.keys() == expected.keys(), f"tensors in only one checkpoint: {sorted(got.keys() ^ expected.keys())}"
    for name, value in expected.items():
        if untrained and name.startswith(untrained):
            assert torch.equal(got[name], start[name].to(value.dtype)), f"{name} was changed by training"
            assert torch.equal(got[name], value), f"{name} was changed by training"
            continue
        error = (got[name] - value).norm() / value.norm()
        assert error < rel, f"{name}: relative error {error:.2e}"
        moved = (value - start[name]).norm()
        trained = not name.endswith("e_score_correction_bias")
        assert (moved > 0) == trained, f"{name} was {'not ' * trained}changed by training"


def assert_same_bits(got_dir: Path | str, expected_dir: Path | str) -> None:
    """Check that two checkpoints have the same tensors, bit by bit, with the same names and dtypes."""
    got, expected = load_weights(got_dir), load_weights(expected_dir)
    assert got.keys() == expected.keys(), f"tensors in only one checkpoint: {sorted(got.keys() ^ expected.keys())}"
    for name, value in expected.items():
        same = got[name].dtype == value.dtype and torch.equal(got[name], value)
        assert same, f"{name}: not bitwise equal to the tensor in {expected_dir}"
