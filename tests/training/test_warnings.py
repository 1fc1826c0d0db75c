"""Tests of the warnings that a run logs if its training goes wrong. A healthy run must log no warnings."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_engine.config.run import Config
from dpo_engine.config.sections import OptimConfig
from dpo_engine.data.dataset import shared_pairs
from dpo_engine.optim.forecast import always_zero, schedule_warnings
from dpo_engine.optim.schedule import build_schedule
from dpo_engine.optim.schedules import SCHEDULES
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.training.warnings import STEPS, Warnings
from support.small_run import config_of, run, write_pairs


@pytest.fixture(autouse=True, scope="module")
def plugin_schedules():
    """Register a schedule that is always 0, and a schedule that is 0 in the first steps."""
    SCHEDULES.register("nothing")(lambda step, total_steps: 0.0)
    SCHEDULES.register("later")(lambda step, total_steps: float(step > 1))
    yield
    del SCHEDULES["nothing"], SCHEDULES["later"]


def rates(optim, steps):
    """Return the learning rates of the real schedule."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = build_schedule(torch.optim.SGD([parameter], lr=1.0), optim, total_steps=steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_lr(schedule.optimizer.param_groups[0]))
        schedule.step(1)
    return found


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd", "inverse_sqrt", "nothing", "later"])
def test_forecast_agrees_with_the_real_schedule(schedule):
    for steps, warmup, lowest in itertools.product((1, 2, 3, 7), (0, 1, 2, 3, 7, 9), (0.0, 1e-5)):
        optim = OptimConfig(lr=1e-3, min_lr=lowest, schedule=schedule, warmup_steps=warmup)
        real = rates(optim, steps)
        assert always_zero(optim, steps) == (max(real) == 0), (steps, warmup, lowest)
        warned = schedule_warnings(optim, steps)
        if schedule not in ("nothing", "later"):
            assert bool(warned) == (max(real) < 1e-3), (steps, warmup, lowest)
        if max(real) == 0:
            assert len(warned) == 1 and "the learning rate is 0 in every step" in warned[0]


def test_lines_about_schedules():
    ratio = OptimConfig(warmup_ratio=0.99)
    assert schedule_warnings(ratio, 40) == [
        "optim.warmup_ratio=0.99: the run has 40 steps, so the learning rate never reaches optim.lr; shorten the warmup"
    ]
    assert schedule_warnings(OptimConfig(warmup_steps=3), 1) == [
        "optim.warmup_steps=3: warmup starts at 0, so the learning rate is 0 in every step of this run (1 step); "
        "remove the warmup, or train more steps"
    ]
    assert schedule_warnings(OptimConfig(schedule="nothing"), 5) == [
        "optim.schedule=nothing: the learning rate is 0 in every step of this run (5 steps); use another schedule, or "
        "set optim.min_lr"
    ]


class Digests(SimpleNamespace):
    def __len__(self):
        return len(self.digests)


def digests(*rows):
    return Digests(digests=np.array(rows, dtype=np.int64).reshape(-1, 2))


def test_shared_pairs_are_counted_by_their_whole_digest():
    train = digests((1, 2), (1, 3), (4, 4), (4, 4), (9, 9))
    assert shared_pairs(train, digests((1, 3), (1, 4), (4, 4), (3, 1), (7, 7))) == 2
    assert shared_pairs(train, digests((2, 2))) == 0


def told(*steps, evaluations=(), vocab=100):
    """Return the warnings of a run.

    steps        the metrics of each step
    evaluations  the metrics of each evaluation; all evaluations follow the last step
    """
    lines, callback = [], Warnings()
    seen = SimpleNamespace(
        step=0, engine=SimpleNamespace(arch=SimpleNamespace(vocab_size=vocab)), sinks=SimpleNamespace(say=lines.append)
    )
    for number, metrics in enumerate(steps):
        seen.step = number + 1
        callback.on_step(seen, {"loss": 1 / (number + 2), "grad_norm": 1.0, "sft_loss": 2.0, **metrics})
    for metrics in evaluations:
        callback.on_eval(seen, {"sft_loss": 2.0, **metrics})
    return lines


def test_steps_without_a_gradient():
    still = {"grad_norm": 0.0}
    assert told(*[still] * (STEPS - 1), {}, *[still] * (STEPS - 1)) == []
    (line,) = told({}, *[still] * (3 * STEPS))
    assert line.startswith("warning: grad_norm: 0 in the last 10 steps, so the loss no longer trains the weights;")
    (line,) = told({}, *[{"grad_norm": 0.0, "loss": 0.0}] * (3 * STEPS))
    assert "grad_norm" in line, "the cause must be reported, not its effect on the loss"


def test_a_constant_loss():
    same = {"loss": 0.5}
    assert told(*[same] * (STEPS - 1), {}, *[same] * (STEPS - 1)) == []
    assert told(*[same] * (2 * STEPS)) == [
        "warning: loss: exactly 0.5 in the last 10 steps; check that the records differ, and that optim.lr is large "
        "enough for the weights to change"
    ]


def test_a_policy_that_is_no_longer_a_language_model():
    limit = math.log(100)
    assert told({}, {"sft_loss": limit - 0.01}) == []
    assert told({"sft_loss": limit + 0.5}, {"sft_loss": limit + 1.4}) == [], "random weights give values near the limit"
    (line,) = told({}, {"sft_loss": limit + 0.01}, {"sft_loss": 50.0})
    assert line.startswith(
        "warning: logps/chosen: -4.62 nats per token after step 2 (-2.00 at the start), below a uniform distribution's "
        "-4.61, so the policy is no longer a language model; lower optim.lr"
    )
    assert len(told({}, evaluations=[{"sft_loss": 9.0}])) == 1


def test_a_resumed_run_compares_with_its_first_step(tmp_path):
    log = [{"step": 1, "lr": 0.1}, {"step": 2, "sft_loss": 2.0}, {"step": 3, "sft_loss": 9.0}]
    lines = resumed(tmp_path, log)
    assert len(lines) == 1 and "-2.00 at the start" in lines[0]
    assert resumed(tmp_path, log[:1]) == [], "without an sft_loss in the log, the first new step is the start"


def resumed(folder, log):
    """Return the warnings of a run that resumes after step 3.

    ``log`` has the lines of the earlier steps. The first step after the resume has an sft_loss so high that the policy
    is no longer a language model.
    """
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    lines, callback = [], Warnings()
    raw = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": str(folder)}}
    callback.on_start(
        seen := SimpleNamespace(
            step=3,
            config=Config.parse(raw),
            data=SimpleNamespace(plan=SimpleNamespace(num_steps=9), validation=None),
            engine=SimpleNamespace(
                arch=SimpleNamespace(vocab_size=100),
                groups=SimpleNamespace(world=SimpleNamespace(rank=lambda: 0)),
            ),
            sinks=SimpleNamespace(say=lines.append),
        )
    )
    callback.on_step(seen, {"loss": 0.5, "grad_norm": 1.0, "sft_loss": 9.0})
    return lines


def test_a_bad_run_is_warned_about_and_a_healthy_run_is_not(files, tiny_hf, tmp_path):
    """The bad run evaluates training pairs, and ends during the warmup of the learning rate."""
    model = tiny_hf("llama", num_hidden_layers=2)
    shared = write_pairs(tmp_path / "both.jsonl", 12)
    common = {"checkpoint": {"export": False}}
    runs = {
        "healthy": {"train": {"max_steps": 3}},
        "bad": {
            "data": {"train": shared, "validation": shared},
            "optim": {"warmup_steps": 50},
            "train": {"epochs": 1},
        },
    }
    logs = {}
    for name, sections in runs.items():
        config = config_of(files, model, tmp_path / name, **common, **sections)
        run_ranks(run, 1, config=config)
        logs[name] = (tmp_path / name / "log.txt").read_text().splitlines()
    assert not [line for line in logs["healthy"] if "warning" in line]
    assert [line[20:] for line in logs["bad"] if "warning" in line] == [
        "warning: optim.warmup_steps=50: the run has 2 steps, so the learning rate never reaches optim.lr; shorten the "
        "warmup",
        "warning: held-out pairs: 12 of 12 are also training pairs, so evaluations look better than they should; "
        "remove these pairs from data.train or data.validation",
    ]
    saved = [line for line in logs["healthy"] if "saved checkpoints/" in line]
    assert len(saved) == 1 and "saved checkpoints/step_00000003 (" in saved[0]
    steps = [json.loads(line) for line in (tmp_path / "healthy" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "loss" in line]
    assert [line["pairs_seen"] for line in steps] == [8, 16, 22]
    assert [line["epoch"] for line in steps] == pytest.approx([8 / 22, 16 / 22, 1])
    assert steps[0]["time"] < steps[1]["time"] < steps[2]["time"]
