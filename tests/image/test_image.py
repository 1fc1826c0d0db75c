"""Tests of the image, which is built on a base image made from this machine's Debian.

The tests cover the image's contents, and training in containers on one node and on two nodes.
"""

import re
import time

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.batch_cluster import PATIENCE_S, ROOT
from support.jobs import run_job
from support.outcomes import trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

IMAGE = "localhost/dpo-engine"


def numbers(output, *names):
    """Return the values of the given metrics at every step."""
    return [float.fromhex(line[name]) for line in trajectory(output) if "loss" in line for name in names]


def test_image_reports_its_contents(built, inside):
    said = inside("cat", "/opt/dpo-engine/image.txt")
    assert said in built, "the build must print the versions"
    assert re.search(r"^torch \d", said, re.MULTILINE) and re.search(r"^megatron-core 0\.16\.", said, re.MULTILINE)
    assert "Transformer Engine absent (No module named 'transformer_engine'): model.spec=auto uses native" in said
    assert "Apex absent" in said
    assert re.search(r"^constraints constraints/megatron-0.16.txt; packages kept from the base image: all", said, re.M)


def test_image_has_the_tested_versions(inside):
    python = inside("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    listed = [line.split("==") for line in inside("/opt/venv/bin/pip", "list", "--format=freeze").splitlines()]
    installed = {canonicalize_name(name): version.partition("+")[0] for name, version in listed}
    pins = [Requirement(line) for line in (ROOT / "constraints/megatron-0.16.txt").read_text().splitlines()[1:]]
    pins = [one for one in pins if one.name in installed]
    pins = {
        one.name: str(one.specifier)
        for one in pins
        if not one.marker or one.marker.evaluate({"python_version": python})
    }
    assert len(pins) > 50 and {name: f"=={installed[name]}" for name in pins} == pins


def test_torch_is_not_replaced(inside):
    """The torch version that the build was given must remain, although the package index also has newer versions."""
    expected = re.search(r"(?m)^torch==(\S+)", (ROOT / "constraints/megatron-0.16.txt").read_text())[1]
    there = inside("python3", "-c", "import torch; print(torch.__version__)").strip()
    assert there.split("+")[0] == expected
    assert f"\ntorch=={there}\n" in inside("cat", "/opt/constraints.txt")


def test_packages_of_the_base_image_are_kept(store, built, build, inside, tmp_path):
    """The base image has torch and a list of constraints, as NVIDIA's images do.

    Two of the constraints contradict what the engine and its build require.
    """
    (tmp_path / "constraint.txt").write_text("cycler==0.11.0\nsetuptools==70.0.0\ntransformers==4.57.0\n")
    base = store.run("buildah", "from", IMAGE).strip()
    store.run("buildah", "copy", base, str(tmp_path / "constraint.txt"), "/etc/pip/constraint.txt")
    store.run("buildah", "config", "--env", "PIP_CONSTRAINT=/etc/pip/constraint.txt", base)
    store.run("buildah", "commit", "--rm", "--format=docker", base, "localhost/nvidia")
    there = inside("python3", "-c", "import torch; print(torch.__version__)").strip()
    said = build("localhost/nvidia", "localhost/again", EXTRAS="quickstart")
    assert f"\ntorch {there}\n" in said and "Successfully installed torch" not in said
    assert "cycler-0.11.0" in said, "the constraint of the base image must apply"


def test_packages_in_the_home_directory_are_ignored(inside, tmp_path):
    version = inside("python3", "-c", "import sys; print('python%d.%d' % sys.version_info[:2])").strip()
    packages = tmp_path / ".local/lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "rich.py").write_text("raise RuntimeError('from the home directory')\n")
    found = inside("env", f"HOME={tmp_path}", "python3", "-c", "import rich; print(rich.__file__)")
    assert found.startswith("/opt/venv/")


def test_image_trains_for_any_user_with_a_read_only_root(store, built, run_yaml, tmp_path, tmp_path_factory):
    files = tmp_path_factory.getbasetemp()
    run = run_yaml("anyone")
    store.run("chmod", "-R", "a+rwX", str(files))
    podman = [
        "podman",
        "run",
        "--rm",
        "--network=host",
        "--read-only",
        "--user=4711:4711",
        "--passwd=false",
        "--env=OMP_NUM_THREADS=1",
    ]
    podman += [f"--volume={files}:{files}", IMAGE]
    # podman refuses a hybrid hierarchy of cgroups, so the unified hierarchy is unmounted in podman's mount namespace.
    alone = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh"]
    who = store.run(*alone, *podman, "sh", "-c", "id -un 2>&1; touch /opt/a 2>&1; echo $HOME")
    assert "cannot find name for user ID 4711" in who and "Read-only file system" in who, who
    store.run(*alone, *podman, "dpo-engine", "train", str(run))
    assert len(numbers(tmp_path / "anyone", "loss")) == 12


def test_image_trains(inside, run_yaml, tmp_path):
    assert inside("dpo-engine", "--help").startswith("usage: dpo-engine")
    assert run_job(["train", str(run_yaml("here"))], 1, tmp_path / "log").codes == [0]
    inside("dpo-engine", "train", str(run_yaml("image")))
    expected = numbers(tmp_path / "here", "loss", "grad_norm")
    assert len(expected) == 2 * 12
    assert numbers(tmp_path / "image", "loss", "grad_norm") == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def in_containers(store, built, submit_from, tmp_path_factory):
    """Return a function: ``in_containers(python)`` prepares container jobs with ``python`` as the Python interpreter.

    The function returns a :class:`Submission` for these jobs, and the jobs' environment variables.
    """
    files = tmp_path_factory.getbasetemp()

    def make(python):
        site = {"CONTAINER": "podman", "IMAGE": IMAGE, "MOUNTS": f"{files}:{files}", "CONTAINER_OPTIONS": ""}
        return submit_from(PYTHON=str(python), **site), store.variables

    return make


def test_two_nodes_train_in_containers(store, in_containers, run_yaml, tmp_path):
    layout = {"tp": 2, "pp": 2}
    assert run_job(["train", str(run_yaml("here", parallel=layout))], 4, tmp_path / "log").codes == [0] * 4
    submission, variables = in_containers("python3")
    job = submission.train(run_yaml("image", parallel=layout), DPO_FAULT="step:0:5:usr1", **variables)
    job.ends("COMPLETED", restarts=1)
    assert "container podman" in job.said and "requeued: interrupted and saved" in job.said
    expected = numbers(tmp_path / "here", "loss", "grad_norm")
    assert numbers(tmp_path / "image", "loss", "grad_norm") == pytest.approx(expected, rel=1e-5)
    assert store.containers() == []


def test_cancelled_job_leaves_no_container(store, in_containers, tmp_path):
    """No container may remain, even if training ignores SIGTERM and SIGUSR1.

    At the end of the job, Slurm kills podman's client, but not the container. launch/task.sh must remove the container.
    """
    deaf = tmp_path / "deaf"
    is_preflight = "if [[ $3 == config ]]; then exit 0; fi"
    deaf.write_text(f"#!/bin/bash\n{is_preflight}\ntrap '' TERM USR1\necho deaf\nwhile :; do sleep 1; done\n")
    deaf.chmod(0o755)
    submission, variables = in_containers(deaf)
    job = submission.train("run.yaml", REMOVE_AFTER_S="2", **variables)
    job.wait("four containers", lambda: job.said.count("deaf\n") == 4)
    assert sorted(store.containers()) == [f"dpo-{job.number}-0-{rank}" for rank in range(4)]
    job.signal()
    job.ends("CANCELLED")
    deadline = time.monotonic() + PATIENCE_S
    while store.containers():
        assert time.monotonic() < deadline, store.containers()
        time.sleep(1)
