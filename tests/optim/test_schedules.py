"""Tests of registered schedules: the learning rate of each step, invalid return values, and the messages of ``check``.

The last test checks whether a schedule's learning rate depends on the length of the run.
"""

import math
from typing import Literal

import pytest

from dpo_engine.config.run import Config
from dpo_engine.config.sections import OptimConfig
from dpo_engine.errors import ConfigError
from dpo_engine.optim.schedule import build_schedule
from dpo_engine.optim.schedules import SCHEDULES, reads_length, schedule_problems

LR, LOW, STEPS = 2e-4, 1e-5, 10


class Groups:
    """A fake optimizer with one parameter group."""

    def __init__(self):
        self.param_groups = [{"wd_mult": 1.0}]


@pytest.fixture
def power(monkeypatch):
    """Register a schedule for one test. Return a list that records the step and the total steps of each call."""
    calls = []

    def decay(step, total_steps, *, exponent: float = 1.0, kind: Literal["down", "up"] = "down"):
        calls.append((step, total_steps))
        done = step / total_steps
        return (1 - done if kind == "down" else 1 + done) ** exponent

    monkeypatch.setitem(SCHEDULES, "power", decay)
    return calls


def config(**optim):
    return Config.parse({"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}, "optim": optim})


@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_of_every_step(power, warmup):
    optim = OptimConfig(lr=LR, min_lr=LOW, schedule="power", schedule_options={"exponent": 2.0}, warmup_steps=warmup)
    groups = Groups()
    schedule = build_schedule(groups, optim, total_steps=STEPS)
    assert power == [(step, STEPS - warmup) for step in range(STEPS - warmup + 1)]
    for step in range(STEPS + 2):  # after the last step, the rate no longer changes
        done = min((step - warmup) / (STEPS - warmup), 1.0)
        expected = LR * step / warmup if step < warmup else LOW + (LR - LOW) * (1 - done) ** 2
        assert groups.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-14)
        assert schedule.get_lr({}) == groups.param_groups[0]["lr"]
        schedule.step(1)


def test_registered_cosine_is_bitwise_equal_to_the_engines(monkeypatch):
    def mine(step, total_steps):
        return 0.5 * (math.cos(math.pi * (step / total_steps)) + 1.0)

    monkeypatch.setitem(SCHEDULES, "mine", mine)
    found = {}
    for name in ("mine", "cosine"):
        groups = Groups()
        schedule = build_schedule(groups, OptimConfig(lr=LR, min_lr=LOW, schedule=name, warmup_steps=3), total_steps=37)
        found[name] = []
        for _ in range(37):
            found[name].append(groups.param_groups[0]["lr"])
            schedule.step(1)
    assert found["mine"] == found["cosine"]


def test_factor_out_of_range_ends_the_run_before_its_first_step(power):
    optim = OptimConfig(schedule="power", schedule_options={"kind": "up"})
    with pytest.raises(ConfigError) as error:
        build_schedule(Groups(), optim, total_steps=STEPS)
    assert error.value.problems == [
        "optim.schedule=power: returned 1.1 for step 1 of 10; a schedule must return a number from 0 to 1"
    ]


@pytest.mark.parametrize(
    "optim, problem",
    [
        (
            {"schedule": "cosin"},
            "optim.schedule=cosin: no such schedule; did you mean cosine? Registered schedules: constant, cosine, "
            "inverse_sqrt, linear, power and wsd (add more with plugins: [my.module])",
        ),
        (
            {"schedule": "power", "schedule_options": {"exponnet": 2.0}},
            "optim.schedule_options.exponnet=2.0: schedule power has no such option; did you mean "
            "optim.schedule_options.exponent?",
        ),
        (
            {"schedule": "power", "schedule_options": {"exponent": "x"}},
            "optim.schedule_options.exponent=x: must be a number; the default is 1.0",
        ),
        (
            {"schedule": "cosine", "schedule_options": {"exponent": 2.0}},
            "optim.schedule_options.exponent=2.0: schedule cosine has no such option; this schedule has no options; "
            "remove optim.schedule_options.exponent",
        ),
    ],
)
def test_messages(power, optim, problem):
    assert schedule_problems(config(**optim)) == [problem]


@pytest.mark.parametrize(
    "schedule, problem",
    [
        (
            lambda step, total_steps: 2.0,
            "optim.schedule=mine: returned 2.0 for step 0 of 10; a schedule must return a number from 0 to 1",
        ),
        (
            lambda step, total_steps: step / 0,
            "optim.schedule=mine: failed: ZeroDivisionError: division by zero; fix the schedule",
        ),
    ],
)
def test_check_calls_a_registered_schedule(schedule, problem, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "mine", schedule)
    assert schedule_problems(config(schedule="mine")) == [problem]


def test_which_schedules_read_the_length_of_the_run(power, monkeypatch):
    assert [reads_length(OptimConfig(schedule=name)) for name in ("constant", "inverse_sqrt", "wsd", "power")] == [
        *(False, False),
        *(True, True),
    ]
    SCHEDULES["power"].reads_length = False
    assert not reads_length(OptimConfig(schedule="power"))
    assert reads_length(OptimConfig(schedule="power", warmup_ratio=0.1))
