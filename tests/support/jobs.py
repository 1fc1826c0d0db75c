"""Run a complete job: start the command line on N forked ranks, and collect the ranks' exit codes and output."""

import faulthandler
import itertools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Finished(NamedTuple):
    """The result of a job.

    codes      exit code of each rank. If a signal ended a rank, the code is negative: -9 for signal 9
    seconds    for each rank, seconds from the start of the job to the rank's exit
    errors     stderr of each rank
    output     stdout of each rank
    survivors  processes of the job that were still running after the last rank had exited; they have been killed
    """

    codes: list[int]
    seconds: list[float]
    errors: list[str]
    output: list[str]
    survivors: list[int]

    @property
    def said(self) -> str:
        """Everything that the job wrote to stderr."""
        return "".join(self.errors)


def run_job(
    arguments: Sequence[str],
    ranks: int,
    folder: Path,
    *,
    fault: str = "",
    environment: Mapping[str, str] | None = None,
    during: Callable[[list[int]], None] | None = None,
    before: Callable[[], None] | None = None,
    own: Mapping[int, Sequence[str]] | None = None,
    timeout_s: float = 120,
    ends_with: Callable[[list[int | None]], bool] = lambda codes: None not in codes,
) -> Finished:
    """Run ``dpo-engine <arguments>`` in ``ranks`` processes on this machine, without a launcher.

    The variables ``RANK`` and ``WORLD_SIZE`` tell each process its rank and the number of ranks, as under a launcher.

    folder      folder for the output of the ranks
    fault       value of ``DPO_FAULT``
    during      called once with the ranks' process ids after all ranks have started, for example to send signals
    before      called on every rank before the command line runs
    own         maps a rank to additional arguments that only this rank gets, after ``arguments``
    ends_with   called repeatedly with the exit codes so far; if it returns true, the remaining ranks are killed

    Ranks that have not exited after ``timeout_s`` seconds are killed too. A killed rank has the exit code -9.
    """
    import megatron.core.models.gpt  # noqa: F401  import before the fork, to save time

    import dpo_engine.training.trainer  # noqa: F401
    from dpo_engine.platform.device import open_platform

    open_platform(deterministic=True)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"DPO_FAULT": fault, **(environment or {})}
    started, pids = time.monotonic(), []
    for rank in range(ranks):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        asked = [*arguments, *(own or {}).get(rank, ())]
        pids.append(_fork(asked, variables, folder / f"rank_{rank}", pids[0] if pids else 0, before))
    if during:
        during(pids)
    codes, seconds = _wait(pids, started, timeout_s, ends_with)
    time.sleep(0.05)
    survivors = members(pids[0])
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    read = {name: [(folder / f"rank_{rank}.{name}").read_text() for rank in range(ranks)] for name in ("err", "out")}
    return Finished(codes, seconds, read["err"], read["out"], survivors)


def members(group: int) -> list[int]:
    """Return the running processes in a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, pgid = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(pgid) == group and state != "Z":
                found.append(int(entry.name))
    return found


_ports = itertools.count(os.getpid() * 64)


def _free_port() -> int:
    """Return a free port. Each call returns a different one.

    The ports are below the ephemeral range, so that no outgoing connection can take a port before rank 0 uses it.
    """
    for _ in range(1000):
        port = 20000 + next(_ports) % 12000
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port from 20000 to 31999")


def _fork(
    arguments: Sequence[str], environment: Mapping[str, str], output: Path, group: int, before: Callable | None
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        try:
            os.setpgid(pid, group or pid)
        except PermissionError:
            pass  # the child has already set its process group
        return pid
    code = 1
    try:
        os.setpgid(0, group)
        for name, stream in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        faulthandler.disable()  # pytest's handler would write to the terminal if a rank aborts
        torch.set_num_threads(1)
        if before:
            before()
        from dpo_engine.cli import main

        code = main(list(arguments))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(
    pids: list[int], started: float, timeout_s: float, ends_with: Callable[[list[int | None]], bool]
) -> tuple[list[int], list[float]]:
    codes: list[int | None] = [None] * len(pids)
    seconds = [0.0] * len(pids)
    killed = False
    while None in codes:
        for rank, pid in enumerate(pids):
            if codes[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    seconds[rank] = time.monotonic() - started
        over = time.monotonic() - started > timeout_s or ends_with(codes)
        if over and not killed and None in codes:
            killed = True
            for rank, pid in enumerate(pids):
                if codes[rank] is None:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return codes, seconds
