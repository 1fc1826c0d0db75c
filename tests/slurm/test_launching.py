"""Tests of jobs that run different verbs, are submitted in unusual ways, or meet problems in Slurm.

A verb is a command of the engine, such as `train`. An interrupted job is requeued. If Slurm must not requeue the job,
the job prints how to continue.
"""

import os
import re
import shutil
import signal

import pytest

from support.jobs import run_job
from support.outcomes import trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_seven_verbs_on_two_nodes(submit_from, run_yaml, tmp_path):
    """Each job waits for the previous job. A verb that needs ranks has one rank on each of the two nodes."""
    run = run_yaml("run", parallel={"tp": 2}, reference={"mode": "stored"}, train={"max_steps": 2})
    submission = submit_from()
    ranks, one = "2 x 1 ranks, {} under srun", "1 process, {} under srun"
    hf = tmp_path / "exported"
    verbs = {
        "check": (one, [], "no problems found"),
        "tokenize": (one, [], "cache: "),
        "reference": (ranks, [], "pairs stored"),
        "train": (ranks, [], "done: 2 steps"),
        "eval": (ranks, [], "wrote "),
        "export": (ranks, ["--to", str(hf)], f"wrote {hf}"),
        "parity": (ranks, [], "4 pairs in float32: tp 2"),
    }
    asked = ["--ntasks-per-node=1", "--dependency=singleton", "launch/run.sbatch"]
    jobs = {verb: submission.submit(*asked, verb, str(run), *more) for verb, (_, more, _) in verbs.items()}
    for verb, (start, _, says) in verbs.items():
        jobs[verb].ends("COMPLETED")
        assert start.format(verb) in jobs[verb].said and says in jobs[verb].said, jobs[verb].said
    assert re.search(r"world.*2|2 ranks", jobs["check"].said), "the plan must have as many ranks as the allocation"
    assert (hf / "config.json").exists()


def test_submitted_by_path_without_an_environment(submit_from, run_yaml, tmp_path):
    installed = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    submission = submit_from(**installed, OMP_NUM_THREADS="1", LOG_DIR="the logs")
    clone, elsewhere = tmp_path / "my clone \u00e9", tmp_path / "else where"
    submission.folder.rename(clone)
    elsewhere.mkdir()
    run = shutil.copy(run_yaml("run", parallel={"tp": 2}, train={"max_steps": 2}), elsewhere / "run a.yaml")
    job = submission.submit(
        "--ntasks-per-node=1",
        "--export=NONE",
        f"{clone}/launch/train.sbatch",
        run.name,
        "train.output_dir=out put",
        folder=elsewhere,
    )
    job.ends("COMPLETED")
    assert (elsewhere / "out put/metrics.jsonl").exists()
    first, second = (elsewhere / f"the logs/dpo-engine-{job.number}.{rank}.log" for rank in (0, 1))
    assert "0: done: 2 steps" in first.read_text() and second.exists()


def test_job_that_may_not_be_requeued(submit_from, run_yaml):
    run = run_yaml("run", parallel={"tp": 2})
    job = submit_from().train(run, "--ntasks-per-node=1", "--no-requeue", DPO_FAULT="step:0:2:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 2")
    job.signal("--batch", "--signal=USR1")
    job.wait_until_it_says("warned by Slurm: the ranks finish their step and save")
    job.signal("--signal=CONT")
    assert job.ends("FAILED")["ExitCode"] == "75:0"
    assert "not requeued: interrupted and saved, but Slurm must not requeue this job" in job.said
    assert f"launch/run.sbatch train {run}\n" in job.said and "\nrequeued" not in job.said


def test_time_limit_shorter_than_the_warning(submit_from, run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml("undisturbed", parallel={"tp": 2}))], 2, tmp_path / "log")
    assert done.codes == [0, 0], done.said
    run = run_yaml("slurm", parallel={"tp": 2})
    job = submit_from().train(run, "--ntasks-per-node=1", "--time=2", DPO_FAULT="step:0:3:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 3")
    job.wait_until_it_says("warned by Slurm: the ranks finish their step and save")
    job.signal("--signal=CONT")
    job.ends("COMPLETED", restarts=1)
    assert "warning: the time limit leaves " in job.said and "requeued: interrupted and saved" in job.said
    assert re.search(r"warned by Slurm \d+ s before the time limit: the ranks will be warned in \d+ s", job.said)
    assert re.search(r"resumed after step [34]\n", job.said)
    assert trajectory(tmp_path / "slurm") == trajectory(tmp_path / "undisturbed")


def test_busy_controller(cluster, submit_from, run_yaml):
    """The controller does not answer while the ranks get the warning and save."""
    job = submit_from().train(run_yaml("slurm", parallel={"tp": 2}), "--ntasks-per-node=1", DPO_FAULT="step:0:3:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 3")
    shell, controller = job.batch_shell(), int((cluster.folder / "run/slurmctld.pid").read_text())
    stopped = int(re.search(r"occurrence 3, process (\d+): stop", job.said)[1])
    os.kill(controller, signal.SIGSTOP)
    try:
        os.kill(shell, signal.SIGUSR1)
        waiting = "srun signals the ranks without the controller"
        job.wait("the signal", lambda: waiting in job.said)
        os.kill(stopped, signal.SIGCONT)
        job.wait("the save", lambda: "SIGUSR1: stopped after step " in job.said)
    finally:
        os.kill(controller, signal.SIGCONT)
    job.ends("COMPLETED", restarts=1)
    assert "requeued: interrupted and saved" in job.said


def test_lost_node_is_excluded(cluster, submit_from, run_yaml):
    """The job needs both nodes of the cluster. After one node is excluded, the job waits until the test cancels it."""
    run = run_yaml("slurm", parallel={"tp": 2})
    job = submit_from(EXCLUDE_ON_LOSS="1").train(run, "--ntasks-per-node=1", DPO_FAULT="step:1:6:stop")
    job.wait_until_it_says("DPO_FAULT: step, occurrence 6")
    assert cluster.script("lose", "n2").returncode == 0
    try:
        job.wait("the exclusion", lambda: "excluded from the next start: n2" in job.said)
        facts = job.facts()
        assert (facts["ExcNodeList"], facts["Restarts"]) == ("n2", "1") and facts["JobState"] in (
            "PENDING",
            "COMPLETING",
        )
    finally:
        job.signal()
        cluster.start()
