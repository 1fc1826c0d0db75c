"""Tests of the formulas of learning-rate schedules, the warmup's length, and the weight decay of parameter groups."""

import math

import pytest

from dpo_engine.config.sections import OptimConfig
from dpo_engine.optim.schedule import build_schedule
from dpo_engine.optim.schedules import warmup_steps

STEPS, LR, LOW = 100, 2e-4, 1e-5


class Groups:
    """A fake optimizer with two parameter groups: one with weight decay and one without."""

    def __init__(self):
        self.param_groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def rates(schedule: str, **options) -> list[float]:
    """Return the learning rate of every step in a run of ``STEPS`` steps, and check the weight decay in every step."""
    optim = OptimConfig(lr=LR, min_lr=LOW, schedule=schedule, weight_decay=0.1, **options)
    groups = Groups()
    made = build_schedule(groups, optim, total_steps=STEPS)
    found = []
    for _ in range(STEPS):
        found.append(groups.param_groups[0]["lr"])
        assert [group["weight_decay"] for group in groups.param_groups] == [0.1, 0.0]
        made.step(1)
    return found


def expected_rate(schedule: str, step: int, warmup: int, decay: int) -> float:
    if warmup and step <= warmup:
        return LR * step / warmup
    done = (step - warmup) / (STEPS - warmup)
    return {
        "constant": LR,
        "linear": LOW + (LR - LOW) * (1 - done),
        "cosine": LOW + (LR - LOW) * 0.5 * (1 + math.cos(math.pi * done)),
        "inverse_sqrt": max(LOW, LR * math.sqrt(max(warmup, 1) / max(step, 1))),
        "wsd": LR if step <= STEPS - decay else LOW + (LR - LOW) * (STEPS - step) / decay,
    }[schedule]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_schedule(schedule, warmup):
    options = {"decay_steps": 25} if schedule == "wsd" else {}
    got = rates(schedule, warmup_steps=warmup, **options)
    expected = [expected_rate(schedule, step, warmup, 25) for step in range(STEPS)]
    assert got == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_over_the_last_tenth_by_default():
    got = rates("wsd")
    assert got[90] == pytest.approx(LR) and got[91] < LR


@pytest.mark.parametrize("options, steps", [({}, 0), ({"warmup_steps": 5}, 5), ({"warmup_ratio": 0.031}, 4)])
def test_warmup_is_a_step_count_or_a_ratio_rounded_up(options, steps):
    assert warmup_steps(OptimConfig(**options), STEPS) == steps
