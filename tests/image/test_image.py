"""Tests of the image, built on a base of this machine's Debian: contents, training in it, and training on two nodes."""

import re
import time

import pytest

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


def test_torch_is_not_replaced(inside):
    """The build upgrades all other packages but keeps torch, although the package index has newer versions of torch."""
    expected = re.search(r"(?m)^torch==(\S+)", (ROOT / "constraints/megatron-0.16.txt").read_text())[1]
    there = inside("python3", "-c", "import torch; print(torch.__version__)").strip()
    assert there.split("+")[0] == expected
    assert inside("cat", "/opt/torch-constraint.txt") == f"torch=={there}\n"


def test_torch_of_the_base_image_is_kept(build, inside):
    """The base image is the only build argument, as for NVIDIA's images."""
    there = inside("python3", "-c", "import torch; print(torch.__version__)").strip()
    said = build(IMAGE, "localhost/again")
    assert f"\ntorch {there}\n" in said and "Successfully installed torch" not in said


def test_image_trains(inside, run_yaml, tmp_path):
    assert inside("dpo-engine", "--help").startswith("usage: dpo-engine")
    assert run_job(["train", str(run_yaml("here"))], 1, tmp_path / "log").codes == [0]
    inside("dpo-engine", "train", str(run_yaml("image")))
    expected = numbers(tmp_path / "here", "loss", "grad_norm")
    assert len(expected) == 2 * 12
    assert numbers(tmp_path / "image", "loss", "grad_norm") == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def in_containers(store, built, submit_from, tmp_path_factory):
    """Return a function that makes a submission whose jobs run in containers, with the necessary environment."""
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
    """No container may be left even if training ignores all signals.

    The end of the job kills podman's client, but not the container, so the job script must remove the container.
    """
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/bash\ntrap '' TERM USR1\necho deaf\nwhile :; do sleep 1; done\n")
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
