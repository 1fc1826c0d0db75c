"""Tests of bad steps: their detection, the agreement of all ranks, and the history of good steps."""

import math

import numpy as np
import pytest
import torch

from dpo_engine.config.sections import BadStepsConfig
from dpo_engine.testing.ranks import run_ranks

CPU = torch.device("cpu")
FINE = {"loss": 0.7, "logps/chosen": -3.0, "logps/rejected": -4.0, "displacement/chosen": 0.1, "grad_norm": 1.0}


def judged(asked, steps, restart_at=None):
    """Return the causes found in each step, and the final counts of skipped, good, and consecutive bad steps.

    steps       for each step, its metrics, and values that replace some of these metrics on rank 1
    restart_at  index of the step before which the state is saved and restored; None: never
    """
    from torch import distributed as dist

    from dpo_engine.training.bad_steps import BadSteps

    watch, found = BadSteps(asked, dist.group.WORLD, CPU), []
    for number, (metrics, wrong) in enumerate(steps):
        if number == restart_at:
            state, watch = watch.state(), BadSteps(asked, dist.group.WORLD, CPU)
            watch.restore(state)
        refused = watch.refuses({**metrics, **(wrong if dist.get_rank() == 1 else {})})
        assert refused == bool(watch.causes)
        found.append(watch.causes)
    return found, (watch.skipped, watch.good, watch.in_a_row)


@pytest.mark.parametrize(
    "wrong, expected",
    [
        ({"loss": math.nan}, ["loss"]),
        ({"grad_norm": math.inf}, ["gradient"]),
        ({"loss": math.nan, "grad_norm": math.nan}, ["loss", "gradient"]),
        ({"loss": math.nan, "displacement/chosen": math.inf}, ["reference"]),
        ({"loss": math.nan, "displacement/chosen": math.nan, "logps/chosen": -math.inf}, ["policy"]),
    ],
)
def test_all_ranks_act_on_what_one_rank_sees(wrong, expected):
    steps = [(FINE, {}), (FINE, wrong), (FINE, wrong), (FINE, {}), (FINE, wrong)]
    causes = [[], expected, expected, [], expected]
    assert run_ranks(judged, 2, asked=BadStepsConfig(), steps=steps) == [(causes, (3, 2, 1))] * 2


@pytest.mark.parametrize("restart_at", [None, 13])
def test_spikes_are_measured_against_the_good_steps_before(restart_at):
    window, sigma = 8, 3.0
    losses = np.random.default_rng(0).normal(1.0, 0.1, size=40)
    losses[[2, 12, 30]] = 9.0  # at index 2, too few good steps are known to detect a spike
    expected, good = [], []
    for loss in losses:
        latest = np.array(good[-window:])
        spike = len(latest) >= window / 2 and loss > latest.mean() + sigma * latest.std()
        expected.append(["loss spike"] if spike else [])
        if not spike:
            good.append(loss)
    assert [number for number, causes in enumerate(expected) if causes][:1] == [12] and ["loss spike"] == expected[30]
    asked = BadStepsConfig(spike_sigma=sigma, spike_window=window)
    steps = [({**FINE, "loss": float(loss)}, {}) for loss in losses]
    for found, (skipped, counted, _) in run_ranks(judged, 2, asked=asked, steps=steps, restart_at=restart_at):
        assert found == expected and (skipped, counted) == (sum(map(len, expected)), len(good))


def test_spikes_are_ignored_by_default():
    steps = [({**FINE, "loss": 1.0 + number % 3}, {}) for number in range(200)] + [({**FINE, "loss": 1e9}, {})]
    assert run_ranks(judged, 1, asked=BadStepsConfig(), steps=steps)[0][0][-1] == []


@pytest.mark.parametrize("before, spike", [(3, False), (4, True)])
def test_spikes_are_found_after_half_a_window(before, spike):
    from dpo_engine.training.bad_steps import BadSteps

    watch = BadSteps(BadStepsConfig(spike_sigma=3.0, spike_window=8), None, CPU)
    assert watch._spike(9.0, [1.0, 1.1, 0.9, 1.0][:before]) == spike


@pytest.mark.parametrize("in_a_row, stops", [(1, False), (2, True)])
def test_run_stops_at_the_limit_of_bad_steps_in_a_row(in_a_row, stops, tmp_path):
    from dpo_engine.errors import NumbersError
    from dpo_engine.training.bad_steps import BadSteps

    watch = BadSteps(BadStepsConfig(stop_after=2), None, CPU)
    watch.causes, watch.in_a_row = ["loss"], in_a_row
    try:
        line = watch._line(5, {"loss": math.nan, "grad_norm": 1.0}, ["a:1"], tmp_path / "step.json")
    except NumbersError as error:
        assert stops and "bad steps in a row: 2; the limit bad_steps.stop_after is reached" in str(error)
    else:
        assert not stops and line.endswith("bad steps in a row: 1 (the run stops at 2)")


def test_resumed_run_continues_the_counts(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from dpo_engine.training import trainer
    from dpo_engine.training.bad_steps import BadSteps

    counts = {"skipped": 3, "good": 4, "in_a_row": 2}
    saved = {**counts, "loss": [0.7, 0.6], "grad_norm": [1.0, 2.0]}
    monkeypatch.setattr(trainer, "load_checkpoint", lambda *args, **options: None)
    monkeypatch.setattr(trainer, "require_finite", lambda *args: None)
    found = SimpleNamespace(
        directory=tmp_path, manifest={"run": {"bad_steps": saved, "pairs_seen": 28}, "identity": {}}
    )
    start = SimpleNamespace(found=found, keeps_following=False, keeps_random=False, step=7, lines=["resumed"])
    said = []
    run = SimpleNamespace(
        start=start,
        engine=SimpleNamespace(arch=None, groups=None),
        trained=None,
        config=None,
        bad_steps=BadSteps(BadStepsConfig(), None, CPU),
        sinks=SimpleNamespace(say=said.append),
    )
    trainer.Trainer.resume(run)
    assert run.step == 7 and run.pairs_seen == 28 and run.bad_steps.state() == saved and said == ["resumed"]
