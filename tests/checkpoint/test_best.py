"""Tests of choosing a run's best steps by an evaluation metric, and of keeping their checkpoints."""

import json

import pytest

from dpo_engine.checkpoint.best import Best, choose, must_save, ranking
from dpo_engine.checkpoint.directory import point, tidy
from dpo_engine.config.sections import KeepBest

LOSS, ACCURACY, MARGIN = (KeepBest(metric=name) for name in ("loss", "rewards/accuracies", "rewards/margins"))


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
    "by, among, steps",
    [
        (LOSS, None, [4, 6, 8, 2]),
        (ACCURACY, None, [6, 8, 4, 2]),
        (MARGIN, None, [4, 8, 2]),
        (KeepBest(metric="rewards/margins", mode="min"), None, [2, 8, 4]),
        (LOSS, [2, 8], [8, 2]),
        (MARGIN, [6], []),
        (LOSS, [1, 7], []),
    ],
)
def test_ranking(by, among, steps):
    assert [best.step for best in ranking(LINES, by, among)] == steps


def test_later_evaluation_of_a_step_replaces_the_earlier_one():
    assert ranking([*LINES, line(4, 0.9, 0.5, 0.5)], LOSS)[0] == Best(6, 0.4)
    assert ranking([], LOSS) == []


@pytest.mark.parametrize(
    "count, damaged, best, removed",
    [
        (1, [], 4, [2, 6]),
        (2, [], 4, [2]),
        (3, [], 4, [2]),  # step 8 is also among the newest two
        (4, [], 4, []),
        (1, [4], 6, [2, 4]),
    ],
)
def test_checkpoints_that_are_kept(count, damaged, best, removed, tmp_path):
    """Steps 2, 4, 6 and 8 have checkpoints. The checkpoint of step 10 is published next; step 10 has no evaluation."""
    for step in (2, 4, 6, 8):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LINES))
    by = KeepBest(metric="loss", count=count)
    names = {f"step_{step:08d}" for step in damaged}
    found = choose(tmp_path, 10, tmp_path / "metrics.jsonl", keep_last=2, keep_best=by, damaged=names)
    assert found == (best, [f"step_{step:08d}" for step in removed])
    unset = choose(tmp_path, 10, tmp_path / "metrics.jsonl", keep_last=2, keep_best=None, damaged=())
    assert unset == (None, ["step_00000002", "step_00000004", "step_00000006"])


@pytest.mark.parametrize(
    "step, count, damaged, save",
    [
        (4, 1, [], True),
        (6, 1, [], False),  # the same loss as step 4, but later
        (6, 2, [], True),
        (8, 2, [], True),
        (8, 1, [], False),
        (8, 1, [4], True),
        (2, 1, [4], True),
        (10, 4, [], False),  # step 10 has no evaluation
    ],
)
def test_evaluated_steps_that_are_saved(step, count, damaged, save, tmp_path):
    """Steps 2 and 4 have checkpoints if they come before ``step``."""
    for other in (other for other in (2, 4) if other < step):
        (tmp_path / f"step_{other:08d}").mkdir()
    lines = [entry for entry in LINES if entry["step"] <= step]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    by, names = KeepBest(metric="loss", count=count), {f"step_{other:08d}" for other in damaged}
    assert must_save(tmp_path, step, tmp_path / "metrics.jsonl", keep_best=by, damaged=names) == save


def test_pointers(tmp_path):
    point(tmp_path, tmp_path / "step_00000004", tmp_path / "step_00000002.2")
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    assert (tmp_path / "best").read_text() == "step_00000002.2\n"
    point(tmp_path, tmp_path / "step_00000006", None)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_unfinished_pointer_is_removed(tmp_path):
    for name in ("best", ".best.12.tmp", ".latest.7.tmp"):
        (tmp_path / name).write_text("step_00000002\n")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
