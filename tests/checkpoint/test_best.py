"""Tests of choosing a run's best step by its held-out metrics."""

import pytest

from dpo_engine.checkpoint.best import Best, best_step


def line(step, loss, accuracy, margin):
    values = {"eval/loss": loss, "eval/rewards/accuracies": accuracy, "eval/rewards/margins": margin}
    return {"step": step, **values}


LINES = [
    {"step": 1, "loss": 0.1},
    line(2, 0.6, 0.5, 1.0),
    line(4, 0.4, 0.75, 3.0),
    line(6, 0.4, 0.875, None),
    line(8, 0.5, 0.875, 2.0),
]


@pytest.mark.parametrize(
    "by, among, expected",
    [
        ("loss", None, Best(4, 0.4)),
        ("accuracy", None, Best(6, 0.875)),
        ("margin", None, Best(4, 3.0)),
        ("loss", [2, 8], Best(8, 0.5)),
        ("margin", [6], None),
        ("loss", [1, 7], None),
    ],
)
def test_best_step(by, among, expected):
    assert best_step(LINES, by, among) == expected


def test_an_evaluation_made_again_counts():
    assert best_step([*LINES, line(4, 0.9, 0.5, 0.5)], "loss") == Best(6, 0.4)
    assert best_step([], "loss") is None
