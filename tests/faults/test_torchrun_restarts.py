"""Tests of restarts by torchrun itself, with a c10d rendezvous.

Two processes of launch/task.sh act as two nodes. Each process starts one torchrun.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.jobs import run_job
from support.outcomes import trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LIMIT_S = 150


@pytest.fixture
def nodes(tmp_path):
    """Return a function that trains on two nodes with one rank each, and returns the exit codes and the logs."""
    running = []

    def start(run: Path, **variables: str) -> tuple[list[int], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "LAUNCHER": "torchrun",
            "PYTHON": sys.executable,
            "RANKS_PER_NODE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "7",
            "DPO_EXIT_CODES": str(tmp_path / "codes"),
            **variables,
        }
        command = ["bash", str(ROOT / "launch/task.sh"), "train", str(run)]
        logs = [tmp_path / f"node_{node}.log" for node in range(2)]
        for node, log in enumerate(logs):
            with log.open("wb") as file:
                own = {**environment, "SLURM_NODEID": str(node)}
                running.append(subprocess.Popen(command, env=own, stdout=file, stderr=file, start_new_session=True))
        return [one.wait(LIMIT_S) for one in running], "".join(log.read_text() for log in logs)

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.long
def test_killed_rank_is_restarted_and_the_run_resumes(nodes, run_yaml, tmp_path):
    """Either node can notice the killed rank first. The nodes' restart counts depend on which node does.

    The counts are therefore not checked.
    """
    often = {"save_interval": 2}
    assert run_job(["train", str(run_yaml("whole", checkpoint=often))], 2, tmp_path / "log").codes == [0, 0]
    codes, said = nodes(
        run_yaml("restarted", checkpoint=often),
        TORCHRUN_OPTIONS="--rdzv-backend=c10d --max-restarts=1",
        DPO_FAULT="step:1:5:kill",
    )
    assert codes == [0, 0], said
    assert "DPO_FAULT: step, occurrence 5" in said
    assert trajectory(tmp_path / "restarted") == trajectory(tmp_path / "whole")
    # The job script takes the job's exit code from the first line of this file, so the restart must have removed the
    # code of the failed start.
    assert (tmp_path / "codes").read_text() == "0\n0\n"
