"""A Slurm cluster for all tests of this folder, and a factory for directories to submit from."""

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
    """``submit_from(LAUNCHER="torchrun")`` makes a directory to submit from, with these site settings."""
    return lambda **site: Submission(cluster, tmp_path / "clone", **site)
