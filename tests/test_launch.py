"""Tests of the launch scripts: they are valid, and the Slurm script starts the right command for each launcher and
container.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.installed import need

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    ROOT / "launch/train.sbatch",
    ROOT / "tests/run.sh",
    ROOT / "tests/slurm/cluster.sh",
    ROOT / ".ci/run",
]

# Fake commands, which replace srun and others: each call appends its name and arguments to a log, as one record.
RECORD = 'printf "%s\\x1f" "$(basename "$0")" "$@" >>"$CALLS"; printf "\\n" >>"$CALLS"\n'
STAND_INS = {
    # This fake srun also runs the first task of the first node: the command after srun's options, `bash launch/task.sh
    # ...`.
    "srun": "while [[ $1 == -* ]]; do shift; done\n"
    '[[ $1 != true || -n ${NODES_ANSWER-yes} ]] || exit 1\nSLURM_PROCID=0 SLURM_NODEID=0 SLURM_LOCALID=0 exec "$@"\n',
    "scontrol": '[[ $1 == show ]] && printf "n1\\nn2\\n"\nexit 0\n',
    "scancel": 'touch "$CALLS.warned"\n',
    # This fake trainer exits with $CODE, either immediately or after it has received Slurm's warning signal.
    "trainer": 'touch "$CALLS.started"\n'
    "while [[ -n ${WAIT:-} && ! -e $CALLS.warned ]]; do sleep 0.05; done\n"
    'if [[ -n ${RANKS_SAY:-} ]]; then printf "%s\\n" $RANKS_SAY >"$DPO_EXIT_CODES"; fi\nexit "${CODE:-0}"\n',
    **dict.fromkeys(
        ("podman", "docker"), 'if [[ $1 == run ]]; then while [[ $1 != trainer ]]; do shift; done; "$@"; fi\n'
    ),
}


@pytest.fixture
def job(tmp_path):
    """Return a function: ``job(CONTAINER="pyxis")`` runs the script for two nodes with four ranks each; see `calls`."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("site.env"))
    for name, body in STAND_INS.items():
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f"#!/usr/bin/env bash\n{RECORD}{body}")
        stand_in.chmod(0o755)
    running = []

    def start(**settings: str) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "PYTHON": "trainer",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            **settings,
        }
        running.append(
            subprocess.Popen(
                ["bash", str(tmp_path / "launch/train.sbatch"), "run.yaml", "train.max_steps=5"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def calls(tmp_path):
    """Return a function: ``calls("srun")`` returns the argument lists of all calls of a fake command."""

    def of(name: str) -> list[list[str]]:
        path = tmp_path / "calls"
        records = [line.split("\x1f")[:-1] for line in path.read_text().splitlines()] if path.exists() else []
        return [record[1:] for record in records if record[0] == name]

    return of


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


def test_shellcheck_finds_nothing():
    need("shellcheck")
    # Excluded: warnings about sourced files, which belong to the site or are checked separately, and about functions
    # that seem unreachable because only a trap calls them.
    command = ["shellcheck", "--exclude=SC1090,SC1091,SC2317", *map(str, SCRIPTS)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


def test_slurm_reads_its_directives():
    text = (ROOT / "launch/train.sbatch").read_text()
    head = text[: text.index("set -euo pipefail")]
    directives = {line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= directives
    assert text.count("#SBATCH ") == len(directives)  # Slurm would ignore a directive after the first command


def test_srun_starts_one_task_per_rank(job, calls):
    code, out, err = finish(job())
    assert (code, err) == (0, "")
    assert "2 x 4 ranks" in out and "n1:" in out
    (step,) = calls("srun")
    assert "--ntasks-per-node=4" in step and "--kill-on-bad-exit=1" in step
    assert step[-4:] == ["bash", "launch/task.sh", "run.yaml", "train.max_steps=5"]
    assert calls("trainer") == [["-m", "dpo_engine", "train", "run.yaml", "train.max_steps=5"]]
    assert calls("scontrol") == [["show", "hostnames", "n[1-2]"]]


def test_torchrun_starts_one_task_per_node(job, calls):
    assert finish(job(LAUNCHER="torchrun"))[0] == 0
    (step,) = calls("srun")
    assert "--ntasks-per-node=1" in step and "--ntasks=2" in step
    (command,) = calls("trainer")
    options = dict(zip(command[2:-5:2], command[3:-5:2], strict=True))
    assert command[:2] == ["-m", "dpo_engine.platform.torchrun"]
    assert command[-5:] == ["-m", "dpo_engine", "train", "run.yaml", "train.max_steps=5"]
    assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "4" and options["--node-rank"] == "0"
    assert options["--master-addr"] == "n1" and 20000 <= int(options["--master-port"]) < 32000


def test_torchrun_supports_the_options_we_use():
    text = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in ("--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port"):
        assert option in text
    assert "--signals-to-handle" in text or "--signals_to_handle" in text


def test_pyxis_runs_the_task_in_the_image(job, calls, tmp_path):
    given = {"NVTE_FUSED_ATTN": "0", "WANDB_NOTES": "a\nb"}
    assert finish(job(CONTAINER="pyxis", IMAGE="lab/engine:1", MOUNTS="/data:/data", **given))[0] == 0
    (step,) = calls("srun")
    (names,) = (
        word.removeprefix("--container-env=").split(",") for word in step if word.startswith("--container-env=")
    )
    assert {"NVTE_FUSED_ATTN", "WANDB_NOTES", "MASTER_ADDR", "OMP_NUM_THREADS"} <= set(names)
    assert not [name for name in names if name.startswith("SLURM_")], "each task has its own values"
    assert "--container-image=lab/engine:1" in step and "--container-mounts=/data:/data" in step
    assert f"--container-workdir={tmp_path}" in step


def test_podman_runs_a_named_container_and_removes_it(job, calls, tmp_path):
    settings = {
        "CONTAINER": "podman",
        "IMAGE": "lab/engine:1",
        "MOUNTS": "/data:/data,/out:/out",
        "NCCL_DEBUG": "WARN",
        "DPO_FAULT": "",
    }
    assert finish(job(**settings))[0] == 0
    run, kill, removal = calls("podman")
    assert run[0] == "run" and run[run.index("lab/engine:1") :][:4] == ["lab/engine:1", "trainer", "-m", "dpo_engine"]
    assert run[run.index("--name") + 1] == "dpo-4711-0-0"
    assert kill == ["kill", "dpo-4711-0-0"]
    assert removal == ["rm", "--force", "dpo-4711-0-0"]
    assert [run[place + 1] for place, word in enumerate(run) if word == "--volume"] == ["/data:/data", "/out:/out"]
    passed = {run[place + 1] for place, word in enumerate(run) if word == "--env"}
    assert {"NCCL_DEBUG", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_JOB_ID"} <= passed
    assert {"DPO_FAULT", "DPO_EXIT_CODES"} <= passed, "rehearse needs these variables in containers too"
    assert "PATH" not in passed
    assert "--ulimit" in run and "--gpus" not in run and "--device" not in run


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"CONTAINER": "podman", "SLURM_GPUS_ON_NODE": "8"}, ["--device", "nvidia.com/gpu=all"]),
        ({"CONTAINER": "podman", "CONTAINER_OPTIONS": "--shm-size 8g"}, ["--shm-size", "8g"]),
        ({"CONTAINER": "docker", "SLURM_GPUS_ON_NODE": "8"}, ["--gpus", "all"]),
    ],
)
def test_container_options(job, calls, settings, expected):
    assert finish(job(IMAGE="lab/engine:1", **settings))[0] == 0
    options = calls(settings["CONTAINER"])[0]
    assert options[options.index(expected[0]) :][:2] == expected
    assert ("--ulimit" in options) is ("CONTAINER_OPTIONS" not in settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"CONTAINER": "lxc"}, "CONTAINER=lxc: must be none, pyxis, podman, docker or apptainer"),
        ({"CONTAINER": "pyxis"}, "IMAGE: must name the image when CONTAINER=pyxis; set it in launch/site.env"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: must be srun or torchrun"),
    ],
)
def test_invalid_settings_end_the_job(job, calls, settings, message):
    code, _, err = finish(job(**settings))
    assert code == 2 and err.strip() == message
    assert calls("srun") == []


@pytest.mark.parametrize(
    ("code", "ranks_say", "expected"),
    [(1, "", 1), (143, "", 143), (137, "6", 6), (143, "3 3", 3), (1, "5", 5), (143, "0", 143)],
)
def test_failed_run_fails_the_job(job, calls, tmp_path, code, ranks_say, expected):
    """The job gets the code of the first rank that exited by itself; the launcher's own code may differ."""
    left, _, err = finish(job(CODE=str(code), RANKS_SAY=ranks_say))
    assert left == expected
    assert f"not requeued: exit code {expected}; a job is requeued only on exit code 75 (interrupted and saved)" in err
    assert ["requeue", "4711"] not in calls("scontrol")
    assert list(tmp_path.glob(".dpo-engine*")) == []


@pytest.mark.parametrize(("code", "ranks_say"), [("75", ""), ("143", "75 75"), ("1", "75")])
def test_interrupted_run_is_requeued(job, calls, code, ranks_say):
    left, _, err = finish(job(CODE=code, RANKS_SAY=ranks_say))
    assert (left, err) == (0, "requeued: interrupted and saved; it continues from its newest checkpoint\n")
    assert calls("scontrol")[-1] == ["requeue", "4711"]


def test_restarts_are_limited(job, calls):
    code, _, err = finish(job(CODE="75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3"))
    assert code == 75 and "not requeued: interrupted and saved, but already restarted 3 times (MAX_RESTARTS)" in err
    assert ["requeue", "4711"] not in calls("scontrol")


@pytest.mark.parametrize("answers", [True, False])
def test_job_that_lost_a_rank_waits_if_a_node_is_gone(job, calls, answers):
    code, _, err = finish(job(CODE="137", NODES_ANSWER="yes" if answers else "", NODE_LOSS_WAIT_S="0.1"))
    assert code == 137 and ("a node does not answer: waiting for Slurm to requeue the job" in err) is not answers
    assert calls("srun")[1] == ["--overlap", "--ntasks-per-node=1", "--ntasks=2", "true"]


@pytest.mark.parametrize(("left_with", "requeued"), [("75", True), ("138", False), ("0", False)])
def test_warning_before_the_time_limit_reaches_the_ranks(job, calls, tmp_path, left_with, requeued):
    process = job(WAIT="yes", CODE=left_with)
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls.started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == (138 if left_with == "138" else 0)
    assert err.startswith("warned by Slurm: the ranks finish their step and save\n")
    assert calls("scancel") == [["--signal=USR1", "4711"]]
    assert (["requeue", "4711"] in calls("scontrol")) is requeued


def test_rank_records_its_exit_code(tmp_path):
    codes = tmp_path / "codes"
    for expected in ("2\n", "2\n2\n"):
        done = subprocess.run(
            [sys.executable, "-m", "dpo_engine", "train", str(tmp_path / "none.yaml")],
            env={**os.environ, "DPO_EXIT_CODES": str(codes)},
            capture_output=True,
        )
        assert done.returncode == 2 and codes.read_text() == expected


@pytest.mark.parametrize(
    "arguments, expected", [(["train", "none.yaml"], 2), (["train"], 2), (["train", "a bug"], 1)], ids=str
)
def test_exit_code_matches_the_outcome(arguments, expected, tmp_path):
    """The exit code must be correct even if argparse or a bug ends the process, or if it cannot be recorded."""
    program = "import runpy, sys, dpo_engine.cli as cli\nif sys.argv[2:] == ['a bug']: cli.main = lambda: 1 / 0\n"
    program += "runpy.run_module('dpo_engine', run_name='__main__')"
    for codes in (tmp_path / "codes", tmp_path / "no directory" / "codes"):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "DPO_EXIT_CODES": str(codes)},
            capture_output=True,
        )
        assert done.returncode == expected
    assert (tmp_path / "codes").read_text() == f"{expected}\n"


def test_site_settings_are_read(job, calls, tmp_path):
    example = (ROOT / "launch/site.env.example").read_text()
    lines = [line.removeprefix("# ") for line in example.splitlines() if line.startswith(("# export ", "# LAUNCHER="))]
    (tmp_path / "launch/site.env").write_text("\n".join(lines) + "\n")
    assert finish(job())[0] == 0
    assert "--ntasks-per-node=1" in calls("srun")[0]  # because of LAUNCHER=torchrun
