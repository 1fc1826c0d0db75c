"""Tests of the script that starts the cluster: `start` checks the requirements, and `stop` leaves nothing running."""

import os
import subprocess

import pytest

from support.batch_cluster import CANNOT, NOT_INSTALLED, SCRIPT, Cluster

pytestmark = pytest.mark.slow


def script(verb, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), verb], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_usage_is_printed_without_a_verb():
    done = script("")
    assert done.returncode == 2 and "cluster.sh lose NODE" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, because the test drops root privileges")
def test_start_requires_root(cluster, tmp_path):
    command = ["setpriv", "--reuid=65534", "--clear-groups", "bash", "-s", "start"]
    done = subprocess.run(
        command, stdin=SCRIPT.open(), env=cluster.environment, capture_output=True, text=True, cwd="/"
    )
    assert (done.returncode, done.stderr) == (
        CANNOT,
        "no Slurm cluster: root is required to create the namespaces that act as nodes\n",
    )


def test_start_requires_capabilities(cluster, tmp_path):
    command = ["setpriv", "--bounding-set=-net_admin", "bash", str(SCRIPT), "start"]
    done = subprocess.run(
        command, env={**os.environ, "CLUSTER_DIR": str(tmp_path / "none")}, capture_output=True, text=True
    )
    assert done.returncode == CANNOT and "are not allowed here (CAP_SYS_ADMIN, CAP_NET_ADMIN)" in done.stderr
    assert not (tmp_path / "none").exists()


def test_missing_packages_are_listed(cluster, tmp_path):
    for program in ("bash", "uname", "cksum", "cut"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    text = SCRIPT.read_text().replace("PATH=$PATH:/usr/sbin:/sbin", "")
    done = subprocess.run(
        ["bash", "-s", "start"], input=text, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == NOT_INSTALLED
    assert done.stderr == (
        "no Slurm cluster: not installed: slurmctld slurmd sbatch munged ip "
        "(to install: bash tests/slurm/cluster.sh install)\n"
    )


def test_stop_leaves_nothing_running(cluster, tmp_path):
    """Start a second cluster next to the first, and stop it while one of its jobs ignores SIGTERM."""
    other = Cluster(tmp_path / "other")
    other.start()
    try:
        up = other.script("status").stdout
        assert "slurmctld up" in up and "n2 up" in up
        job = other.client(
            "sbatch", "--nodes=2", "--output=/dev/null", "--wrap=trap '' TERM; sleep 600 & wait", cwd=tmp_path
        )
        assert job.returncode == 0, job.stderr
        assert other.leftovers()
    finally:
        other.stop()
    assert other.leftovers() == []
    assert "slurmctld down" in other.script("status").stdout
    assert "n1 up" in cluster.script("status").stdout
