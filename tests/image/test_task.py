"""Tests of launch/task.sh and launch/variables.sh: verbs, torchrun's options, and variables passed to containers.

Stand-ins replace Python and the container programs. The stand-ins record their arguments and environment variables.
"""

import os
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dpo_engine import cli
from dpo_engine.training.rank_guard import SWITCHES

LAUNCH = Path(__file__).parents[2] / "launch"
RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >>"$CALLS"
printf '\\n\\0' >>"$CALLS"
env -0 >"$CALLS.environment"
"""


@pytest.fixture
def task(tmp_path):
    """Return a function: ``task("run.yaml", CONTAINER="docker")`` runs task.sh and returns the recorded calls."""
    for name in ("podman", "docker", "apptainer", "python"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments: str, code: int = 0, **variables: str) -> list[list[str]]:
        calls.write_text("")
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOME": "/nowhere",
            "CALLS": str(calls),
            "PYTHON": "python",
            "IMAGE": "lab/engine:1",
            "MOUNTS": "/data:/data,/scratch space:/out",
            "SLURM_JOB_ID": "7",
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "1",
            "SLURM_NNODES": "2",
            "RANKS_PER_NODE": "4",
            "MASTER_ADDR": "n1",
            "MASTER_PORT": "29500",
            **variables,
        }
        command = ["bash", str(LAUNCH / "task.sh"), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        run.stderr = done.stderr
        records = calls.read_text().split("\n\0")[:-1]
        return [record.split("\0")[:-1] for record in records]

    return run


def values(call: list[str], option: str) -> list[str]:
    """Return the words that follow the occurrences of an option."""
    return [call[place + 1] for place, word in enumerate(call) if word == option]


def recorded_environment(folder: Path) -> dict[str, str]:
    text = (folder / "calls.environment").read_text()
    return dict(line.split("=", 1) for line in text.split("\0")[:-1])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_first_word_is_the_verb(task, verb):
    assert task(verb, "run.yaml", "a.b=c") == [["python", "-m", "dpo_engine", verb, "run.yaml", "a.b=c"]]


@pytest.mark.parametrize(
    ("arguments", "files", "expected"),
    [
        (["run.yaml"], [], ["train", "run.yaml"]),
        (["model.path=m"], [], ["train", "model.path=m"]),
        (["my_runs/one"], [], ["train", "my_runs/one"]),
        (["llama"], ["llama"], ["train", "llama"]),
        (["llama", "a.b=c"], ["llama"], ["train", "llama", "a.b=c"]),
        (["eval", "run.yaml"], ["eval", "run.yaml"], ["eval", "run.yaml"]),
        (["evl", "run.yaml"], [], ["evl", "run.yaml"]),
        ([], [], ["train"]),
    ],
    ids=str,
)
def test_verb_is_train_unless_one_is_given(task, arguments, files, expected, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    assert task(*arguments) == [["python", "-m", "dpo_engine", *expected]]


def test_torchrun_uses_the_addresses_of_the_job(task):
    (call,) = task("eval", "run.yaml", LAUNCHER="torchrun", TORCHRUN_OPTIONS="--max-restarts=2")
    assert call[:3] == ["python", "-m", "dpo_engine.platform.torchrun"]
    assert call[3:-4] == [
        *("--nnodes", "2", "--nproc-per-node", "4"),
        *("--node-rank", "1", "--master-addr", "n1", "--master-port", "29500", "--max-restarts=2"),
    ]
    assert call[-4:] == ["-m", "dpo_engine", "eval", "run.yaml"]


@pytest.mark.parametrize("options", ["--rdzv-backend=c10d --nnodes=1:2", "--rdzv_backend c10d"])
@pytest.mark.parametrize(("node", "host"), [("0", "true"), ("1", "false")])
def test_torchrun_can_use_a_c10d_rendezvous(task, options, node, host):
    (call,) = task("run.yaml", LAUNCHER="torchrun", TORCHRUN_OPTIONS=options, SLURM_NODEID=node)
    assert values(call, "--rdzv-endpoint") == ["n1:29500"] and values(call, "--rdzv-conf") == [f"is_host={host}"]
    assert values(call, "--rdzv-id") == ["dpo-7-0"]
    assert "--node-rank" not in call and "--master-addr" not in call
    assert " ".join(call).endswith(f"{options} -m dpo_engine train run.yaml")


@pytest.mark.parametrize("container", ["podman", "docker"])
def test_container_receives_every_variable_that_ranks_compare(task, container):
    """Test one variable for each pattern in `SWITCHES`."""
    switches = [switch.replace("*", "X").replace("?", "X") for switch in SWITCHES]
    assert all(any(fnmatch(name, switch) for switch in SWITCHES) for name in switches)
    call, *_ = task("run.yaml", CONTAINER=container, **dict.fromkeys(switches, "1"))
    assert set(switches) <= set(values(call, "--env"))


PASSED = """
PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF GLOO_SOCKET_IFNAME NCCL_IB_HCA UCX_TLS FI_PROVIDER NVIDIA_TF32_OVERRIDE
CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_HOME XDG_CACHE_HOME HF_HOME
HF_TOKEN TRANSFORMERS_OFFLINE TOKENIZERS_PARALLELISM OMP_NUM_THREADS KMP_AFFINITY WANDB_API_KEY MLFLOW_TRACKING_URI
TRACKIO_DIR SWANLAB_API_KEY
http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE PYTHONPATH
PYTHONUNBUFFERED PYTHONNOUSERSITE MASTER_ADDR SLURM_PROCID DPO_FAULT DPO_EXIT_CODES WORLD_SIZE RANK
""".split()
KEPT = """
HOSTNAME LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME VIRTUAL_ENV CONDA_PREFIX CUDA_HOME CUDA_PATH NCCL_VERSION TMPDIR SHELL
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES MY_SECRET
""".split()


def test_container_receives_what_affects_training(task):
    call, *_ = task("run.yaml", CONTAINER="podman", **dict.fromkeys(PASSED + KEPT, ""))
    assert set(PASSED) <= set(values(call, "--env"))
    assert not set(KEPT + ["PATH", "HOME", "IMAGE"]) & set(values(call, "--env"))


def test_more_variables_can_be_named(task):
    call, *_ = task("run.yaml", CONTAINER="podman", CONTAINER_ENV="MY_SECRET,LAB_A LAB_B", MY_SECRET="1", LAB_A="2")
    assert {"MY_SECRET", "LAB_A"} <= set(values(call, "--env")) and "LAB_B" not in values(call, "--env")


def test_values_are_not_on_the_command_line(task):
    """podman and docker read the value of `--env NAME` from the environment, so newlines and quotes are harmless."""
    value = "a 'b' \"c\"\n--env d=$(e) \\"
    call, *_ = task("run.yaml", CONTAINER="podman", WANDB_NOTES=value)
    assert "WANDB_NOTES" in values(call, "--env") and not any('c"' in word for word in call)


def test_apptainer_runs_the_image(task, tmp_path):
    value = "a 'b' \"c\"\nd"
    variables = {"WANDB_NOTES": value, "NVTE_FUSED_ATTN": "0", "MY_SECRET": "1"}
    (call,) = task("eval", "run.yaml", CONTAINER="apptainer", IMAGE="engine.sif", **variables)
    assert call == [
        *("apptainer", "exec", "--nv", "--bind", "/data:/data,/scratch space:/out", "--pwd", str(tmp_path)),
        *("engine.sif", "python", "-m", "dpo_engine", "eval", "run.yaml"),
    ]
    found = recorded_environment(tmp_path)
    # Without the prefix `APPTAINERENV_`, the image's own values would take precedence.
    assert found["APPTAINERENV_WANDB_NOTES"] == value and found["APPTAINERENV_NVTE_FUSED_ATTN"] == "0"
    assert found["APPTAINERENV_PYTHONNOUSERSITE"] == "1", "must be set, because apptainer mounts the home directory"
    assert "APPTAINERENV_MY_SECRET" not in found and "APPTAINERENV_HOME" not in found
    (call,) = task("run.yaml", CONTAINER="apptainer", CONTAINER_OPTIONS="--cleanenv --no-home")
    assert call[call.index("--cleanenv") :][:3] == ["--cleanenv", "--no-home", "lab/engine:1"]


def test_pyxis_runs_the_task_in_the_container(task, tmp_path):
    assert task("run.yaml", CONTAINER="pyxis") == [["python", "-m", "dpo_engine", "train", "run.yaml"]]
    assert recorded_environment(tmp_path)["PYTHONNOUSERSITE"] == "1", (
        "must be set, because enroot may mount the home directory"
    )


def test_docker_output_belongs_to_the_user(task):
    call, *_ = task("run.yaml", CONTAINER="docker")
    assert values(call, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert set(values(call, "--group-add")) == set(map(str, {*os.getgroups(), os.getgid()}))
    assert "HOME=/tmp" in values(call, "--env"), "must be set, because docker sets HOME=/ otherwise"
    call, *_ = task("run.yaml", CONTAINER="podman")
    assert "--user" not in call and "HOME=/tmp" not in call


@pytest.mark.parametrize("container", ["podman", "docker"])
@pytest.mark.parametrize(
    ("home", "expected"), [("/data/ada", ["HOME=/data/ada"]), ("/database", []), ("/scratch space/ada", [])]
)
def test_home_is_passed_if_it_is_mounted_under_the_same_path(task, container, home, expected):
    call, *_ = task("run.yaml", CONTAINER=container, HOME=home)
    found = [word for word in values(call, "--env") if word.startswith("HOME=")]
    assert found == (expected or (["HOME=/tmp"] if container == "docker" else []))
    assert values(call, "--volume") == ["/data:/data", "/scratch space:/out"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, ["--ulimit", "memlock=-1"]), ({"CONTAINER_OPTIONS": "--user 0:0"}, ["--user", "0:0"])],
    ids=["default", "given"],
)
def test_options_come_last(task, variables, expected):
    call, *_ = task("run.yaml", CONTAINER="docker", **variables)
    assert call[call.index("lab/engine:1") - 2 :][:2] == expected
    assert ("memlock=-1" in call) is (not variables)


def test_unknown_container_is_refused(task):
    assert task("run.yaml", CONTAINER="lxc", code=2) == []
    assert task.stderr == "CONTAINER=lxc: must be none, pyxis, podman, docker or apptainer\n"
