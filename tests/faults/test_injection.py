"""Tests of the fault injector: its settings, the occurrence at which a fault fires, and complete runs with faults."""

import errno
import os
import signal

import pytest

from dpo_engine import faults
from dpo_engine.errors import ConfigError
from support.jobs import run_job
from support.outcomes import trajectory


@pytest.fixture(autouse=True)
def unarmed():
    yield
    faults.arm(0, 1, {})


@pytest.mark.parametrize(
    "text, says",
    [
        ("step:0:1", "must have the form <phase>:<rank>:<nth>:<action>"),
        ("stepp:0:1:kill", "unknown phase or value 'stepp'; use one of rendezvous"),
        ("step:first:1:kill", "invalid rank 'first': use a number, or * for"),
        ("step:2:1:kill", "rank 2 does not exist; use 0 to 1, or *"),
        ("step:0:0:kill", "invalid count '0': use 1 for the first occurrence"),
        ("step:0:1:nan", "step has no action 'nan'; use one of kill"),
        ("gradient:0:1:kill", "gradient has no action 'kill'; use one of nan"),
    ],
)
def test_invalid_settings_are_refused(text, says):
    with pytest.raises(ConfigError) as error:
        faults.arm(0, 2, {"DPO_FAULT": text})
    assert str(error.value).startswith(f"DPO_FAULT={text}: {says}")


def test_fault_fires_at_the_nth_time_on_its_rank():
    armed = {"DPO_FAULT": "save-shard:1:2:enospc,gradient:*:1:nan"}
    faults.arm(0, 2, armed)
    faults.reach("save-shard")
    faults.reach("save-shard")
    assert faults.factor("loss") is None and faults.factor("gradient") != faults.factor("gradient")
    faults.arm(1, 2, armed)
    faults.reach("save-shard")
    with pytest.raises(OSError) as error:
        faults.reach("save-shard", "some/file")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "some/file")
    faults.reach("save-shard")


def test_faults_that_never_fired_are_reported_at_the_end(capsys):
    faults.arm(0, 2, {"DPO_FAULT": "save-shard:0:2:enospc,step:*:1:raise,log:0:1:raise,eval:1:1:kill"})
    faults.reach("save-shard")
    with pytest.raises(RuntimeError):
        faults.reach("step")
    capsys.readouterr()
    faults.say_unmet()
    assert capsys.readouterr().err.splitlines() == [
        "DPO_FAULT: rank 0 reached save-shard 1 of 2 times, so enospc was not triggered",
        "DPO_FAULT: rank 0 reached log 0 of 1 times, so raise was not triggered",
    ]


def test_run_reports_a_fault_that_never_fired(run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml())], 1, tmp_path / "log", fault="step:0:99:kill")
    assert done.codes == [0]
    assert done.said == "DPO_FAULT: rank 0 reached step 12 of 99 times, so kill was not triggered\n"


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_restarted_job_gets_no_faults(name):
    faults.arm(0, 2, {"DPO_FAULT": "step:0:1:raise", name: "1"})
    faults.reach("step")
    faults.arm(0, 2, {"DPO_FAULT": "step:0:1:raise", name: "0"})
    with pytest.raises(RuntimeError, match="DPO_FAULT: step"):
        faults.reach("step")


@pytest.mark.slow
def test_killed_job_resumes_bitwise(run_yaml, tmp_path):
    whole = run_job(["train", str(run_yaml("whole"))], 2, tmp_path / "log")
    assert whole.codes == [0, 0] and not whole.survivors, whole.said
    harmed = run_yaml("harmed")
    # The saves must not run in a thread, because the thread could still be writing step 4 when the rank is killed.
    command = ["train", str(harmed), "checkpoint.async_save=false"]
    died = run_job(command, 2, tmp_path / "log", fault="step:1:6:kill")
    assert died.codes[1] == -signal.SIGKILL and died.codes[0] != 0
    assert "DPO_FAULT: step, occurrence 6" in died.errors[1] and os.path.isdir(
        tmp_path / "harmed/checkpoints/step_00000004"
    )
    left = [tmp_path / "harmed" / name for name in (".config.yaml.7.tmp", "eval/.x.parquet.7.tmp")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert run_job(command, 2, tmp_path / "log").codes == [0, 0]
    assert not any(path.exists() for path in left)
    assert trajectory(tmp_path / "harmed") == trajectory(tmp_path / "whole")
