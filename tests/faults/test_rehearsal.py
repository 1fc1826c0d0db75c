"""Tests of `rehearse`: it passes if a run resumes exactly, and fails if metrics differ after a resume."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine.config.rules import contradictions
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, EngineError
from dpo_engine.verbs import rehearse as rehearsal
from support.jobs import run_job

# This loss depends on how many times the process has called it, so a resumed run has different metrics.
FORGETFUL = """
import torch.nn.functional as F
from dpo_engine.objective.losses import LOSSES

calls = 0

@LOSSES.register("forgetful", needs_reference=True, at_init=lambda options: None)
def forgetful(policy, reference, *, beta: float = 0.1):
    global calls
    calls += 1
    return -F.logsigmoid(beta * calls * (policy.chosen - policy.rejected - reference.chosen + reference.rejected))
"""


@pytest.fixture
def forked(monkeypatch, tmp_path):
    """Make `rehearse` fork the ranks from this process, which is faster than starting new interpreters."""

    def start(config, run, output, world, fault=""):
        command = rehearsal.train_command(config, run, output)[3:]
        finished = run_job(command, world, tmp_path / "log", fault=fault)
        return finished.codes, finished.output[0] + finished.errors[0]

    monkeypatch.setattr(rehearsal, "_start", start)


def lines_of(run: Path, world: int) -> tuple[bool, list[str]]:
    said: list[str] = []
    return rehearsal.rehearse(Config.load(run), world=world, say=said.append), said


@pytest.mark.slow
def test_reproducible_run_passes(run_yaml, tmp_path, forked):
    held, said = lines_of(run_yaml(), 2)
    assert held, said
    assert re.fullmatch("a rank is killed during a step: resumed after step [24], identical metrics", said[1])
    assert said[2:] == [
        "a rank is killed during a save: resumed after step 2, identical metrics",
        "the disk is full during a save: resumed after step 2, identical metrics",
        "all ranks receive SIGTERM: resumed after step 3, identical metrics",
    ]
    assert not (tmp_path / "run" / "rehearsal").exists()


@pytest.mark.slow
def test_run_with_an_adapter_passes(run_yaml, forked):
    held, said = lines_of(run_yaml(adapter={"kind": "dora", "rank": 3}, parallel={"tp": 2}), 2)
    assert held, said
    assert len([line for line in said if line.endswith(", identical metrics")]) == 4


@pytest.mark.slow
def test_run_that_resumes_differently_fails(run_yaml, tmp_path, forked, monkeypatch):
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(tmp_path)
    held, said = lines_of(run_yaml(plugins=["forgetful"], loss={"name": "forgetful"}), 1)
    assert not held
    assert (
        "the metrics of the restarted run differ from those of the uninterrupted run" in said[1]
        and "DPO_FAULT=optimizer:0:5:kill" in said[2]
    )


def test_settings_that_do_not_fit_a_rehearsal_are_switched_off(run_yaml, tmp_path):
    """A rehearsal evaluates nothing, so it must not keep a best checkpoint or stop early. It reports to no tracker."""
    best = {"keep_best": {"metric": "eval/loss"}, "export": "best", "save_interval": "0.5epoch"}
    logs = {"profile": {"steps": [10, 12]}, "sinks": {"swanlab": {}}}
    run = run_yaml(train={"eval_interval": "0.25epoch", "stop_after_no_gain": 2}, checkpoint=best, logging=logs)
    assert contradictions(Config.load(run)) == []
    overrides = [part for part in rehearsal.train_command(Config.load(run), run, tmp_path) if "=" in part]
    rehearsed = Config.load(run, overrides)
    assert contradictions(rehearsed) == [] and rehearsed.logging.sinks == {}


def test_run_with_too_few_steps_is_refused(run_yaml, forked):
    with pytest.raises(
        EngineError, match="a rehearsal needs 6 steps, but the run has only 1; raise train.epochs, or lower"
    ):
        lines_of(run_yaml(train={"global_batch_size": 24, "epochs": 1}), 1)


def test_run_that_fails_without_faults_is_reported(run_yaml, run_files, tmp_path, forked):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("[1]\n")
    folder = tmp_path / "run/rehearsal/whole"
    with pytest.raises(EngineError) as caught:
        lines_of(run_yaml(data={"train": str(broken)}), 1)
    says = rf"{folder}: the uninterrupted run did not reach step 6: {broken}:1: [^\n]+"
    assert re.fullmatch(says, str(caught.value))


@pytest.mark.slow
def test_settings_for_longer_runs_are_adjusted(run_yaml, forked):
    sections = {
        "train": {"eval_at_start": True, "save_by": 1, "epochs": 9, "max_steps": 50},
        "checkpoint": {"resume": False},
        "optim": {"schedule": "wsd", "warmup_steps": 20, "decay_steps": 20},
    }
    held, said = lines_of(run_yaml(**sections), 1)
    assert held, said


@pytest.mark.long
@pytest.mark.slow
def test_from_the_command_line(run_yaml):
    command = [sys.executable, "-m", "dpo_engine", "rehearse", str(run_yaml()), "--world-size", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("identical metrics") == 4


def test_rehearsal_inside_a_run_of_several_ranks_is_refused(run_yaml, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        rehearsal.rehearse(Config.load(run_yaml()))
    assert str(caught.value) == (
        "rehearse: must run in a single process, because this verb starts the ranks itself; run it without torchrun or "
        "srun, with --world-size N"
    )
