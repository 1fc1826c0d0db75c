"""A two-node Slurm cluster, which `tests/slurm/cluster.sh` starts, and jobs that tests submit as a user would."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from support.installed import absent

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/slurm/cluster.sh"
CANNOT, NOT_INSTALLED = 77, 78
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
PATIENCE_S = 300  # on an idle machine, jobs start within seconds, but machines are shared


class Cluster:
    """A cluster whose state is in ``folder``; `start` skips the test if the machine cannot run a cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        package = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        ours["PYTHONPATH"] = os.pathsep.join(filter(None, [package, ours.get("PYTHONPATH", "")]))
        self.environment = {**ours, "CLUSTER_DIR": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}

    def script(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", str(SCRIPT), *arguments], env=self.environment, capture_output=True, text=True)

    def start(self) -> None:
        done = self.script("start")
        if done.returncode == CANNOT:
            pytest.skip(done.stderr.strip())
        if done.returncode == NOT_INSTALLED:
            absent(done.stderr.strip())
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        done = self.script("stop")
        assert done.returncode == 0, done.stderr

    def client(self, *command: str, **options) -> subprocess.CompletedProcess:
        """Run one of Slurm's own commands."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, **options)

    def leftovers(self) -> list[str]:
        """List processes, network namespaces and links of this cluster that still exist."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                except OSError:
                    continue
                if str(self.folder).encode() in said:
                    found.append(f"process {entry.name}: {said[:80]!r}")
        conf = (self.folder / "slurm.conf").read_text()
        name = re.search(r"ClusterName=(\w+)", conf)[1]
        networks = [path.name for path in Path("/run/netns").glob("*")] if Path("/run/netns").is_dir() else []
        return found + [one for one in (*networks, *os.listdir("/sys/class/net")) if one.startswith(name)]


class Submission:
    """A directory from which tests submit jobs.

    Like a user's clone, the directory contains the scripts of `launch/` and a `launch/site.env`.
    """

    def __init__(self, cluster: Cluster, folder: Path, **site: str):
        self.cluster = cluster
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("site.env"))
        settings = {"PYTHON": sys.executable, **site}
        (folder / "launch/site.env").write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))

    def sbatch(
        self, *arguments: str, environment: Mapping[str, str] = {}, folder: Path | None = None
    ) -> subprocess.CompletedProcess:
        asked = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=10", *arguments]
        command = ["sbatch", "--parsable", *asked]
        surroundings = {**self.cluster.environment, **environment}
        folder = folder or self.folder
        return subprocess.run(command, env=surroundings, cwd=folder, capture_output=True, text=True, timeout=60)

    def train(self, run: Path | str, *options: str, **environment: str) -> "Job":
        """Submit ``launch/train.sbatch`` for a run, by default on 2 nodes with 2 ranks each.

        Options of sbatch change these defaults.
        """
        return self.submit(*options, "launch/train.sbatch", str(run), **environment)

    def submit(self, *arguments: str, folder: Path | None = None, **environment: str) -> "Job":
        """Submit a job with sbatch's arguments, from this directory or from ``folder``."""
        done = self.sbatch(*arguments, environment=environment, folder=folder)
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        return Job(self.cluster, number, (folder or self.folder) / f"dpo-engine-{number}.log")


class Job:
    """A submitted job. If waiting for the job takes too long, the test fails and shows the job's output."""

    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster = cluster
        self.number = number
        self.log = log

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def facts(self) -> dict[str, str]:
        """Return the output of `scontrol show job` as a dictionary."""
        shown = self.cluster.client("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))

    def wait(self, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.facts()}\n{self.said[-4000:]}"
            time.sleep(0.3)

    def wait_until_it_says(self, text: str) -> None:
        def there() -> bool:
            return text in self.said or (self.state() in ENDED)

        self.wait(repr(text), there)
        assert text in self.said, self.said[-4000:]

    def wait_until_requeued(self, restarts: int = 1) -> None:
        self.wait(f"restart {restarts}", lambda: self.facts().get("Restarts") == str(restarts) or self.state() in ENDED)
        assert self.facts()["Restarts"] == str(restarts), self.said[-4000:]

    def state(self) -> str:
        return self.facts().get("JobState", "")

    def ends(self, state: str, restarts: int | None = 0) -> dict[str, str]:
        """Wait until the job ends, and check its final state. Return the output of `scontrol show job` as a dictionary.

        state     expected state
        restarts  expected number of restarts; None: at least one
        """
        self.wait("the end of the job", lambda: self.state() in ENDED)
        facts = self.facts()
        expected = facts["Restarts"] if restarts is None else str(restarts)
        assert (facts["JobState"], facts["Restarts"]) == (state, expected), f"{facts}\n{self.said[-4000:]}"
        assert restarts is not None or int(facts["Restarts"]) > 0
        return facts

    def batch_shell(self) -> int:
        """Return the process id of the batch script."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    called, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                except OSError:
                    continue
                mine = f"SLURM_JOB_ID={self.number}\0".encode() in variables
                if mine and str(self.cluster.folder).encode() in variables and b"slurm_script" in called:
                    return int(entry.name)
        raise AssertionError(f"no batch script\n{self.said[-4000:]}")

    def signal(self, *arguments: str) -> None:
        done = self.cluster.client("scancel", *arguments, self.number)
        assert done.returncode == 0, done.stderr

    def update(self, **settings: str) -> None:
        said = [f"{name}={value}" for name, value in settings.items()]
        done = self.cluster.client("scontrol", "update", f"JobId={self.number}", *said)
        assert done.returncode == 0, done.stderr
