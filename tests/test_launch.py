"""Tests of the launch scripts: the scripts are valid, and start the right command with the right settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine.cli import VERBS
from support.installed import need
from support.slurm_stand_ins import finish

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    ROOT / "launch/run.sbatch",
    ROOT / "tests/run.sh",
    ROOT / "tests/slurm/cluster.sh",
    ROOT / ".ci/run",
]


@pytest.fixture
def job(stage):
    """Return a function: ``job(CONTAINER="pyxis")`` starts train.sbatch as a job on two nodes with four ranks each."""
    return stage.start


@pytest.fixture
def calls(stage):
    """Return a function: ``calls("srun")`` returns the argument lists of all calls of a fake command."""
    return stage.calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


def test_shellcheck_finds_nothing():
    need("shellcheck")
    # Exclude warnings about sourced files, which belong to the site or are checked separately. Also exclude warnings
    # about functions that seem unreachable because only a trap calls them.
    command = ["shellcheck", "--exclude=SC1090,SC1091,SC2317", *map(str, SCRIPTS)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("script", ["run.sbatch", "train.sbatch"])
def test_slurm_reads_its_directives(script):
    text = (ROOT / "launch" / script).read_text()
    head = text[: text.index("set -euo pipefail")]
    directives = {line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= directives
    assert text.count("#SBATCH ") == len(directives)  # Slurm would ignore a directive after the first command


def test_srun_starts_one_task_per_rank(job, calls, tmp_path):
    code, out, err = finish(job())
    assert (code, err) == (0, "")
    assert "2 x 4 ranks" in out and "n1:" in out
    (step,) = calls("srun")
    assert "--ntasks-per-node=4" in step and "--kill-on-bad-exit=1" in step and "--export=ALL" in step
    assert step[-5:] == ["bash", str(tmp_path / "launch/task.sh"), "train", "run.yaml", "train.max_steps=5"]
    assert calls("trainer") == [["-m", "dpo_engine", "train", "run.yaml", "train.max_steps=5"]]
    assert all(call[0] == "show" for call in calls("scontrol"))


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


@pytest.mark.slow
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
    assert not [name for name in names if name.startswith("SLURM_")], (
        "variables that start with SLURM_ must not be passed, because their values differ between tasks"
    )
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
    run, kill, removal = calls("podman")[3:]  # the first container only checks the image
    assert run[0] == "run" and run[run.index("lab/engine:1") :][:4] == ["lab/engine:1", "trainer", "-m", "dpo_engine"]
    assert run[run.index("--name") + 1] == "dpo-4711-0-0"
    assert kill == ["kill", "dpo-4711-0-0"]
    assert removal == ["rm", "--force", "dpo-4711-0-0"]
    assert [run[place + 1] for place, word in enumerate(run) if word == "--volume"] == ["/data:/data", "/out:/out"]
    passed = {run[place + 1] for place, word in enumerate(run) if word == "--env"}
    assert {"NCCL_DEBUG", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_JOB_ID"} <= passed
    assert {"DPO_FAULT", "DPO_EXIT_CODES"} <= passed, "the verb `rehearse` needs these variables in containers too"
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
    options = calls(settings["CONTAINER"])[3]
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
    """The job exits with the first exit code that a rank recorded.

    If no rank recorded an exit code, or the first recorded code is 0, the job exits with the launcher's exit code.
    """
    left, _, err = finish(job(CODE=str(code), RANKS_SAY=ranks_say))
    assert left == expected
    assert f"not requeued: exit code {expected}; a job is requeued after exit code 75 (interrupted)" in err
    assert ["requeue", "4711"] not in calls("scontrol")
    assert list(tmp_path.glob(".dpo-engine*")) == []


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
    "arguments, expected",
    [pytest.param(["train", "none.yaml"], 2, marks=pytest.mark.slow), (["train"], 2), (["train", "a bug"], 1)],
    ids=str,
)
def test_exit_code_matches_the_outcome(arguments, expected, tmp_path):
    """The exit code must be correct even if argparse or a bug ends the process, or if the code cannot be recorded."""
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


def test_site_settings_are_read(stage, job, calls, tmp_path):
    example = (ROOT / "launch/site.env.example").read_text()
    chosen = ("# export ", "# LAUNCHER=", "# NCCL_", "# PYTORCH_")
    lines = [line.removeprefix("# ") for line in example.splitlines() if line.startswith(chosen)]
    (tmp_path / "launch/site.env").write_text("\n".join(lines) + "\n")
    assert finish(job())[0] == 0
    assert "--ntasks-per-node=1" in calls("srun")[0]  # because of LAUNCHER=torchrun
    assert stage.environment()["NCCL_SOCKET_IFNAME"] == "eth0"
    assert stage.environment()["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_site_settings_can_add_options_modules_and_a_hook(stage):
    (stage.folder / "launch/site.env").write_text(
        "module() { [[ $1 == load ]] && export MODULES_LOADED=${*:2}; }\n"
        "enter_site() { false; echo $UNSET >/dev/null; NCCL_TOPO_FILE=/etc/topo.xml; }\n"
        "MODULES='cuda/12.8 nccl'\nSITE_HOOK=enter_site\nSRUN_OPTIONS='--mpi=none --network=x'\n"
        f"LOG_DIR='{stage.folder}/log s'\nGLOO_SOCKET_IFNAME=ib0\nPATH=$PATH:/site/bin\n"
    )
    assert finish(stage.start())[::2] == (0, "")
    (step,) = stage.calls("srun")
    assert ["--mpi=none", "--network=x"] == step[step.index("--mpi=none") :][:2]
    assert f"--output={stage.folder}/log s/dpo-engine-4711.%t.log" in step and "--label" in step
    assert (stage.folder / "log s").is_dir()
    found = stage.environment()
    assert (found["MODULES_LOADED"], found["NCCL_TOPO_FILE"]) == ("cuda/12.8 nccl", "/etc/topo.xml")
    assert found["GLOO_SOCKET_IFNAME"] == "ib0" and found["SLURM_EXPORT_ENV"] == "ALL"


@pytest.mark.parametrize("verb", ["reference", "eval", "export", "parity"])
def test_verb_runs_on_all_ranks(stage, verb):
    code, out, err = finish(stage.start(verb, "run.yaml", "--x=1", script="run.sbatch"))
    assert (code, err) == (0, "") and f"2 x 4 ranks, {verb} under srun" in out
    assert "--ntasks-per-node=4" in stage.calls("srun")[0]
    assert stage.calls("trainer") == [["-m", "dpo_engine", verb, "run.yaml", "--x=1"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tokenize", "run.yaml"], ["tokenize", "run.yaml"]),
        (["check", "run.yaml"], ["check", "run.yaml", "--world-size=8"]),
        (["check", "run.yaml", "--world-size", "64"], ["check", "run.yaml", "--world-size", "64"]),
    ],
)
def test_verb_that_needs_no_ranks_is_one_process(stage, arguments, expected):
    code, out, _ = finish(stage.start(*arguments, script="run.sbatch", LAUNCHER="torchrun"))
    assert code == 0 and "1 process" in out
    (step,) = stage.calls("srun")
    assert "--nodes=1" in step and "--ntasks=1" in step
    assert stage.calls("trainer") == [["-m", "dpo_engine", *expected]]


def test_all_remaining_verbs_are_one_process():
    """The verbs train, reference, eval, export and parity run on the ranks of the job.

    The list of single-process verbs in job.sh must contain exactly the remaining verbs.
    """
    (line,) = [line for line in (ROOT / "launch/job.sh").read_text().splitlines() if "| tokenize |" in line]
    listed = {name.strip(" )") for name in line.split("|")}
    assert listed == set(VERBS) - {"train", "reference", "eval", "export", "parity"}


def test_job_is_submitted_from_elsewhere(stage):
    """Slurm reports the path of the script that was submitted, followed by the script's arguments."""
    clone = stage.folder / "my clone \u00e9"
    elsewhere = stage.folder / "else where"
    elsewhere.mkdir()
    clone.mkdir()
    (stage.folder / "launch").rename(clone / "launch")
    (clone / "launch/site.env").write_text("CONTAINER=pyxis\nIMAGE=lab/engine:1\n")
    (stage.folder / "launch").symlink_to(clone / "launch")
    stage.set_record(Command=f"{clone}/launch/train.sbatch /data/launch/run.yaml")
    assert finish(stage.start("run.yaml", cwd=elsewhere))[::2] == (0, "")
    (step,) = stage.calls("srun")
    assert step[-4:] == ["bash", f"{clone}/launch/task.sh", "train", "run.yaml"]
    assert f"--container-mounts={elsewhere}:{elsewhere},{clone}/launch:{clone}/launch" in step
    assert f"--container-workdir={elsewhere}" in step


def test_engine_of_the_clone_is_used_from_elsewhere(stage):
    (stage.folder / "dpo_engine").mkdir()
    (stage.folder / "elsewhere").mkdir()
    stage.set_record(Command=f"{stage.folder}/launch/run.sbatch")
    assert finish(stage.start(cwd=stage.folder / "elsewhere", PYTHONPATH="/x", PYTHON="bin/trainer"))[0] == 0
    clone = stage.folder
    assert stage.environment()["PYTHONPATH"] == f"{clone}:{clone}/kernels:/x"
    assert stage.environment()["PYTHON"] == f"{clone}/bin/trainer"


def test_error_about_missing_scripts_says_where_to_submit_from(stage):
    (stage.folder / "elsewhere").mkdir()
    code, _, err = finish(stage.start(cwd=stage.folder / "elsewhere"))
    assert code == 2 and err == (
        f"launch/job.sh: found neither next to the submitted script nor in {stage.folder}/elsewhere; submit the script "
        "by its path in a clone: sbatch PATH/TO/CLONE/launch/run.sbatch VERB RUN.yaml\n"
    )
    assert len(stage.calls("sleep")) == 4, "the controller can be busy, so the script must ask several times"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"PYTHON": "/x/python"},
            "PYTHON=/x/python: does not exist on n1; set PYTHON in launch/site.env to the interpreter of an "
            "environment in which dpo-engine is installed",
        ),
        (
            {"PREFLIGHT": "Traceback:\n  x\nNo module named dpo_engine\n"},
            "PYTHON=trainer: cannot start the engine on n1 (No module named dpo_engine); set PYTHON in launch/site.env "
            "to the interpreter of an environment in which dpo-engine is installed",
        ),
        (
            {"CONTAINER": "docker", "IMAGE": "lab:1", "PREFLIGHT": "pull access denied"},
            "IMAGE=lab:1, PYTHON=trainer: cannot start the engine on n1 (pull access denied); in launch/site.env, set "
            "IMAGE to an image in which dpo-engine is installed, and PYTHON to the image's interpreter",
        ),
        (
            {"CONTAINER": "pyxis", "IMAGE": "/x/engine.sqsh"},
            "IMAGE=/x/engine.sqsh: does not exist on n1; set IMAGE in launch/site.env to a file on shared storage",
        ),
        ({"LOG_DIR": "/proc/x"}, "LOG_DIR=/proc/x: cannot be created; set another directory in launch/site.env"),
        (
            {"MODULES": "cuda", "MODULESHOME": "/x", "LMOD_PKG": "/x"},
            "MODULES=cuda: `module` does not exist on n1; in launch/site.env, source the file that defines it",
        ),
        (
            {"SITE_HOOK": "x.sh"},
            "SITE_HOOK=x.sh: neither a function of launch/site.env nor a file; correct the name",
        ),
    ],
)
def test_problems_are_reported_once_before_the_start(stage, settings, message):
    code, _, err = finish(stage.start(**settings))
    assert (code, err) == (2, f"{message}\n")
    assert stage.calls("srun") == []


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (
            "module() { return 1; }\nMODULES=cuda",
            "MODULES=cuda: `module load` failed; list the modules of the nodes with ",
        ),
        ("enter() { return 3; }\nSITE_HOOK=enter", "SITE_HOOK=enter: the function failed with exit code 3"),
        ("SITE_HOOK=launch/site.sh", "SITE_HOOK=launch/site.sh: the file failed with exit code 4"),
    ],
)
def test_site_code_that_fails_ends_the_job(stage, site, message):
    (stage.folder / "launch/site.env").write_text(site + "\n")
    (stage.folder / "launch/site.sh").write_text("return 4\n")
    code, _, err = finish(stage.start())
    assert code == 2 and err.startswith(message)


def test_clone_without_its_scripts_is_refused(stage):
    (stage.folder / "launch/task.sh").unlink()
    code, _, err = finish(stage.start())
    assert code == 2 and "task.sh: does not exist; submit the script by its path in a complete clone" in err
