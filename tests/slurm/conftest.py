"""Fixtures: a Slurm cluster for all tests in this folder, and directories from which tests submit jobs."""

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
    """Return a function: ``submit_from(LAUNCHER="torchrun")`` makes a directory from which a test submits jobs.

    The settings that are passed to the function are written to `launch/site.env` in this directory.
    """
    return lambda **site: Submission(cluster, tmp_path / "clone", **site)
