"""Fault tests of mixtures of experts: if a rank dies, the others exit, and a restart matches an uninterrupted run."""

import signal

import pytest

from support.family_cases import checkpoint
from support.jobs import run_job
from support.outcomes import trajectory

SHORT = {"train": {"max_steps": 6, "eval_interval": 3}, "checkpoint": {"save_interval": 2}, "parallel": {"ep": 2}}


@pytest.fixture(scope="module")
def model(tiny_hf):
    return {"model": {"path": str(checkpoint(tiny_hf, "glm4_moe, groups"))}}


@pytest.mark.parametrize(
    "phase, rank, nth",
    [
        pytest.param("forward", 1, 5, marks=pytest.mark.slow),
        pytest.param("reduce", 1, 3, marks=pytest.mark.slow),
        pytest.param("save-shard", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_rank_ends_the_job_and_the_restart_matches(phase, rank, nth, model, run_yaml, tmp_path):
    whole, run = (run_yaml(name, **SHORT, **model) for name in ("whole", "run"))
    finished = run_job(["train", str(whole)], 2, tmp_path / "log")
    assert finished.codes == [0, 0], finished.said
    died = run_job(["train", str(run)], 2, tmp_path / "log", fault=f"{phase}:{rank}:{nth}:kill", timeout_s=60)
    assert died.codes[rank] == -signal.SIGKILL and died.codes[1 - rank] == 6 and not died.survivors, died.said
    again = run_job(["train", str(run)], 2, tmp_path / "log")
    assert again.codes == [0, 0], again.said
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")
    assert {"router/balance", "router/z", "router/load"} <= trajectory(tmp_path / "run")[0].keys()
