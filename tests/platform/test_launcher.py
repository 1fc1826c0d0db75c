"""Tests of reading the launcher's variables: rank, number of ranks, index on the node, and port."""

import datetime
import os
import subprocess
import sys

import pytest

from dpo_engine.errors import ConfigError
from dpo_engine.platform.launcher import local_rank, world_from_environment
from dpo_engine.platform.parallel import meet

SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
INTEL = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
"""Variables in a batch script. The script's process is not one of the ranks."""


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0)),
        (BATCH, (0, 1, 0)),
        (SRUN, (3, 4, 1)),
        (MPIRUN, (3, 4, 1)),
        (INTEL, (3, 4, 1)),
        (TORCHRUN, (3, 4, 1)),
        ({**BATCH, **MPIRUN}, (3, 4, 1)),
        ({**BATCH, "SLURM_STEP_ID": "0", **MPIRUN}, (3, 4, 1)),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 1)),
        ({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, (0, 1, 1)),
        ({**SRUN, "WORLD_SIZE": "4"}, (3, 4, 1)),
        ({**SRUN, "SLURM_JOB_ID": "7", "WORLD_SIZE": "4"}, (3, 4, 1)),
        ({**SRUN, "RANK": "3"}, (3, 4, 1)),
        ({**MPIRUN, "WORLD_SIZE": "4"}, (3, 4, 1)),
        ({**BATCH, **MPIRUN, "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"WORLD_SIZE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({**SRUN, **TORCHRUN, "RANK": "2", "LOCAL_RANK": "0"}, (2, 4, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"WORLD_SIZE": " 2\n", "RANK": "1 "}, (1, 2, 0)),
    ],
)
def test_rank_and_number_of_ranks(env, expected):
    assert (*world_from_environment(env), local_rank(env)) == expected


COUNT = "because ranks start at 0"
SET = "start with torchrun or launch/train.sbatch, which set valid values"


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"WORLD_SIZE": "2"}, f"RANK: is not set, but WORLD_SIZE is 2; {SET}, or set RANK to a number from 0 to 1"),
        (
            {**BATCH, "SLURM_JOB_ID": "7", "WORLD_SIZE": "4"},
            f"RANK: is not set, but WORLD_SIZE is 4; {SET}, or set RANK to a number from 0 to 3",
        ),
        ({"RANK": "1"}, f"RANK=1: is set, but WORLD_SIZE is not; {SET}, or set WORLD_SIZE, or unset RANK"),
        ({**BATCH, "RANK": "0"}, f"RANK=0: is set, but WORLD_SIZE is not; {SET}, or set WORLD_SIZE, or unset RANK"),
        (
            {**SRUN, "WORLD_SIZE": "8"},
            f"RANK: is not set, but WORLD_SIZE is 8; {SET}, or set RANK to a number from 0 to 7",
        ),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, f"RANK=abc: must be a whole number of at least 0; {SET}"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, f"RANK=-1: must be a whole number of at least 0; {SET}"),
        ({"WORLD_SIZE": "2", "RANK": "١"}, f"RANK=١: must be a whole number of at least 0; {SET}"),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            f"RANK=2: must be less than WORLD_SIZE=2, {COUNT}; {SET}",
        ),
        (
            {**SRUN, "SLURM_PROCID": "4"},
            f"SLURM_PROCID=4: must be less than SLURM_NTASKS=4, {COUNT}; {SET}",
        ),
        ({"WORLD_SIZE": "0", "RANK": "0"}, f"WORLD_SIZE=0: must be a whole number of at least 1; {SET}"),
        ({"WORLD_SIZE": "", "RANK": "0"}, f"WORLD_SIZE=: must be a whole number of at least 1; {SET}"),
    ],
)
def test_wrong_variable_is_named(env, line):
    with pytest.raises(ConfigError) as error:
        world_from_environment(env)
    assert error.value.problems == [line]


def test_wrong_local_rank_is_named():
    with pytest.raises(ConfigError, match=f"^LOCAL_RANK=x: must be a whole number of at least 0; {SET}$"):
        local_rank({"LOCAL_RANK": "x"})


@pytest.mark.parametrize(
    ("port", "line"),
    [
        ("abc", f"MASTER_PORT=abc: must be a whole number of at least 0; {SET}"),
        ("65536", f"MASTER_PORT=65536: must be at most 65535; {SET}"),
    ],
)
def test_wrong_port_is_named(monkeypatch, port, line):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError) as error:
        meet(0, datetime.timedelta(seconds=1))
    assert error.value.problems == [line]


def test_command_reports_a_wrong_variable_in_one_line():
    env = {**os.environ, "WORLD_SIZE": "2"} | {"RANK": "two"}
    overrides = ["model.path=m", "data.train=d.jsonl", "train.output_dir=o"]
    command = [sys.executable, "-m", "dpo_engine", "train", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"RANK=two: must be a whole number of at least 0; {SET}\n"
