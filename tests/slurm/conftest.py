"""Fixtures: a Slurm cluster for all tests in this folder, and a function that makes directories to submit jobs from."""

import pytest

from support.batch_cluster import Cluster, Submission


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        if (cluster.folder / "slurm.conf").exists():
            cluster.stop()
            assert cluster.leftovers() == []


@pytest.fixture
def submit_from(cluster, tmp_path):
    """Return a function: ``submit_from(LAUNCHER="torchrun")`` makes a directory to submit from, with a `site.env`."""
    return lambda **site: Submission(cluster, tmp_path / "clone", **site)
