"""Run the command line on untrusted files, on one rank. Report output, time, memory and changed files."""

import json
import os
import pickle
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.jobs import run_job

CANARY = "canary"


class Payload:
    """An object that creates the directory ``canary`` in the working directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


PICKLE = pickle.dumps(Payload())


class Outcome(NamedTuple):
    """Result of a run on one rank.

    code      exit code
    seconds   CPU time in seconds
    grown     peak growth of the memory in bytes
    errors    lines that the run wrote to stderr
    output    what the run wrote to stdout
    changed   files and directories that were added, removed or changed. The folder ``out``, to which the run writes its
              results, is not compared
    """

    code: int
    seconds: float
    grown: int
    errors: list[str]
    output: str
    changed: set[str]


def run_alone(arguments: Sequence[str], folder: Path) -> Outcome:
    """Run the command line on one rank, in ``folder``."""
    logs = folder.with_name(folder.name + "-log")
    cost = logs / "cost"

    def before() -> None:
        os.chdir(folder)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        leave = os._exit

        def left(code: int) -> None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            grown = used.ru_maxrss * 1024 - pages * resource.getpagesize()
            cost.write_text(json.dumps([used.ru_utime + used.ru_stime, grown]))
            leave(code)

        os._exit = left

    listed = listing(folder)
    job = run_job(arguments, 1, logs, before=before, timeout_s=60)
    changed = {name for name, _ in listed ^ listing(folder)}
    seconds, grown = json.loads(cost.read_text())
    return Outcome(job.codes[0], seconds, grown, job.said.splitlines(), job.output[0], changed)


def listing(folder: Path) -> set[tuple[str, tuple]]:
    """Return all paths below ``folder`` except ``out``, with the attributes that change when a file is written."""
    found = set()
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name != "out"]
        for name in [*folders, *files]:
            path = Path(parent, name)
            state = path.lstat()
            size = () if path.is_dir() and not path.is_symlink() else (state.st_size, state.st_mtime_ns)
            found.add((str(path.relative_to(folder)), (state.st_mode, *size)))
    return found
