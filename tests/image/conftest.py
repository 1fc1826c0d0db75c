"""Fixtures: the image of docker/Dockerfile, and a Slurm cluster that can run containers of the image.

The image is built once for all tests in this folder.
"""

import re

import pytest

from slurm.conftest import cluster, submit_from  # noqa: F401  fixtures
from support.batch_cluster import ROOT
from support.container_store import ContainerStore, debian_base, pip_volumes

IMAGE = "localhost/dpo-engine"


@pytest.fixture(scope="session")
def store():
    store = ContainerStore()
    try:
        yield store
    finally:
        store.close()


@pytest.fixture(scope="session")
def build(store, tmp_path_factory):
    """Return a function: ``build("localhost/base", "localhost/new", EXTRAS="wandb")`` builds an image from a base.

    The function returns the build's output.
    """
    volumes = pip_volumes(tmp_path_factory.mktemp("build"))

    def run(base, image, **arguments):
        given = {"BASE_IMAGE": base, **arguments}
        return store.run(
            *("buildah", "bud", "--isolation=chroot", "--format=docker", "--file", str(ROOT / "docker/Dockerfile")),
            *(f"--build-arg={name}={value}" for name, value in given.items()),
            *(f"--volume={volume}" for volume in volumes),
            *("--tag", image, str(ROOT)),
        )

    return run


@pytest.fixture(scope="session")
def built(store, build):
    """Build the image, and return the build's output."""
    empty = store.run("buildah", "from", "scratch").strip()
    store.run("buildah", "add", empty, str(debian_base()), "/")
    store.run("buildah", "commit", "--rm", "--format=docker", empty, "localhost/debian")
    torch = re.search(r"(?m)^torch==\S+", (ROOT / "constraints/megatron-0.16.txt").read_text())[0]
    return build("localhost/debian", IMAGE, TORCH_REQUIREMENT=torch)


@pytest.fixture(scope="session")
def inside(store, built, tmp_path_factory):
    """Return a function: ``inside("python3", "-V")`` runs a command in a container, and returns the command's output.

    The container can read and write the tests' files.
    """
    name = store.run("buildah", "from", IMAGE).strip()
    files = tmp_path_factory.getbasetemp()

    def run(*command):
        options = ["--isolation=chroot", "--env=OMP_NUM_THREADS=1", f"--volume={files}:{files}"]
        return store.run("buildah", "run", *options, name, "--", *command)

    return run
