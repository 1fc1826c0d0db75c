"""Tests of training jobs that are submitted to Slurm.

If a job is interrupted and requeued, its metrics are those of an undisturbed run. A job that fails or is canceled is
not requeued.

Most tests set `DPO_FAULT=step:R:N:stop`, which suspends the process of rank R after the N-th step. At this known
moment, the job is warned, preempted or canceled, or a node is lost. The suspended process then receives SIGCONT and
continues, or is killed with its node. The expected metrics come from forked ranks, which run without Slurm.
"""

import re

import pytest

from support.jobs import run_job
from support.outcomes import trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LAYOUT = {"tp": 2, "pp": 2}


@pytest.fixture
def undisturbed(run_yaml, tmp_path):
    """Return a function: ``undisturbed(layout)`` runs four ranks without Slurm and returns their metrics."""

    def run(layout):
        done = run_job(["train", str(run_yaml("undisturbed", parallel=layout))], 4, tmp_path / "log")
        assert done.codes == [0] * 4, done.said
        return trajectory(tmp_path / "undisturbed")

    return run


def test_warning_before_the_time_limit(submit_from, run_yaml, undisturbed, tmp_path):
    expected = undisturbed(LAYOUT)
    run = run_yaml("slurm", parallel=LAYOUT)
    job = submit_from().train(run, "--signal=B:USR1@90", DPO_FAULT="step:0:5:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 5")
    job.update(TimeLimit=str(int(job.facts()["RunTime"].split(":")[1]) + 2))
    job.wait_until_it_says("warned by Slurm: the ranks finish their step and save")
    job.signal("--signal=CONT")
    job.wait_until_requeued()
    job.update(TimeLimit="10")
    step = re.search(r"SIGUSR1: stopped after step ([56]) of 12 and saved a checkpoint", job.said)[
        1
    ]  # 5 or 6, because SIGUSR1 and SIGCONT can arrive in either order
    assert "requeued: interrupted and saved" in job.said
    job.ends("COMPLETED", restarts=1)
    assert "start 2: 2 x 2 ranks" in job.said and f"resumed after step {step}\n" in job.said, (
        "the restart must append to the log"
    )
    assert trajectory(tmp_path / "slurm") == expected


def test_warning_under_torchrun(submit_from, run_yaml, undisturbed, tmp_path):
    """The test warns only the batch shell, which warns the ranks. The ranks save, and the job is requeued.

    The exit code of torchrun does not show that the ranks saved: it is 1 for any nonzero exit code of the ranks.
    """
    layout = {"tp": 2}
    expected = undisturbed(layout)
    job = submit_from(LAUNCHER="torchrun").train(run_yaml("slurm", parallel=layout), DPO_FAULT="step:0:5:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 5")
    job.signal("--batch", "--signal=USR1")
    job.wait_until_it_says("warned by Slurm")
    job.signal("--signal=CONT")
    job.ends("COMPLETED", restarts=1)
    assert "requeued: interrupted and saved" in job.said and re.search(r"resumed after step [56]\n", job.said)
    assert trajectory(tmp_path / "slurm") == expected


def test_preemption(submit_from, run_yaml, undisturbed, tmp_path):
    expected = undisturbed(LAYOUT)
    submission = submit_from()
    job = submission.train(run_yaml("slurm", parallel=LAYOUT), DPO_FAULT="step:0:6:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 6")
    urgent = submission.sbatch("--partition=urgent", "--exclusive", "--output=urgent.log", "--wrap=hostname")
    assert urgent.returncode == 0, urgent.stderr
    job.wait_until_requeued()
    job.ends("COMPLETED", restarts=1)
    assert (submission.folder / "urgent.log").read_text() == "n1\n"
    step = re.search(r"SIGTERM: stopped after step (\d+) of 12 and saved a checkpoint", job.said)[1]
    assert f"resumed after step {step}\n" in job.said, "no step may be lost"
    assert trajectory(tmp_path / "slurm") == expected


def test_lost_node(cluster, submit_from, run_yaml, undisturbed, tmp_path):
    expected = undisturbed(LAYOUT)
    job = submit_from().train(run_yaml("slurm", parallel=LAYOUT), DPO_FAULT="step:2:6:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 6")
    assert cluster.script("lose", "n2").returncode == 0
    job.wait_until_requeued()
    cluster.start()
    job.ends("COMPLETED", restarts=None)  # Slurm may kill a process of the restarted job; the job then restarts again
    assert "resumed after step 4" in job.said
    assert trajectory(tmp_path / "slurm") == expected


def test_cancelled_job_is_not_requeued(submit_from, run_yaml, tmp_path):
    """The ranks of a canceled job finish their step, save and exit with code 75, unless KillWait ends first."""
    job = submit_from().train(run_yaml("slurm", parallel=LAYOUT), DPO_FAULT="step:0:2:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 2")
    job.signal()
    job.wait_until_it_says("SIGTERM: stopped after step ")
    job.ends("CANCELLED")


def test_failing_rank_fails_the_job(submit_from, run_yaml):
    job = submit_from().train(run_yaml("slurm", parallel=LAYOUT), DPO_FAULT="step:3:2:kill")
    assert job.ends("FAILED")["ExitCode"] != "0:0"
    assert "not requeued: " in job.said and "start 2" not in job.said


def test_bad_data_keeps_its_exit_code(submit_from, run_yaml, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a", "chosen": "b"}\n')
    run = run_yaml("slurm", parallel={"tp": 2}, data={"train": str(wrong)})
    assert submit_from(LAUNCHER="torchrun").train(run).ends("FAILED")["ExitCode"] == "3:0"


@pytest.mark.parametrize(
    "asked, says",
    [("--nodes=3", "Node count specification invalid"), ("--gpus-per-node=9", "Requested node configuration")],
)
def test_job_that_cannot_run_is_rejected(submit_from, asked, says):
    done = submit_from().sbatch(asked, "launch/train.sbatch", "run.yaml")
    assert done.returncode == 1 and says in done.stderr
