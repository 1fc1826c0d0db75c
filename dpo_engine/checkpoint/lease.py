"""The lease of a run's output directory: at most one run at a time writes to `train.output_dir`.

The problem: a job is submitted twice, or started again while its earlier processes are still running. Both runs write
checkpoints and metrics to one directory, and remove each other's unfinished files. The directory then contains a
mixture of two runs, and no error reports this.

The solution: rank 0 holds a lease, a file in `<train.output_dir>/lease` that names the host, the process, the Slurm job
and the start time. Lease files are numbered, and only the file with the highest number counts. A run takes the lease by
creating the file with the next number, and the file system lets only one process create this file. A new run may take
the lease if there is no lease, if the last lease was released, or if the holder of the last lease is dead:

1. On the same machine, the holder is dead if and only if no process has the holder's process ID and start time.
2. On another machine, it is dead if it has the new run's Slurm job ID and a lower restart count: the job was requeued.
3. If neither rule decides, the new run watches the lease for `WATCH_S` seconds, or longer if the storage is slow.
   The holder is dead if the lease does not change. A holder renews its lease every `RENEW_S` seconds in a thread: it
   sets the file's modification time. The new run compares this time only with earlier reads, never with its own clock.

Before a new holder writes anything else, it removes the older lease files. The former holder may still be alive, if it
was only suspended or cut off from the storage. At its next renewal or save, it finds its file gone, and ends at once.

Why this way: locks (flock) do not work on all network storage, and can be lost silently there. NFS has supported the
exclusive creation of files since version 3. No process ever replaces a file of another process, and the number of a
taken lease is never used again, so two runs that find the same dead holder cannot both succeed. Slow storage alone does
not end a lease, because only another run that wants the directory checks whether the holder is dead.

Not covered: a former holder that is suspended after it checks the lease and before it renames a file or directory to
its final name. If it resumes, the rename fails only if the new holder has already removed this file or directory.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from dpo_engine.atomic_files import HashedFile, make_directory, remove_unfinished, sync, write_whole
from dpo_engine.errors import CheckpointError, printable, shorten
from dpo_engine.exit_code import record

FOLDER = "lease"
RENEW_S = 3.0
"""Seconds between two renewals."""
WATCH_S = 30.0
"""Seconds without a renewal after which a holder on another machine counts as dead."""
SLOWEST_READS = 3
"""The watch is extended by this number times the duration of the slowest read, because renewals may be as slow."""
POLL_S = (0.02, 1.0)
"""Initial and maximum number of seconds between two reads of another run's lease."""
QUIET_S = 1.0
"""Seconds of waiting after which a process logs, once, that it is waiting."""
LARGEST = 1 << 16
_NAME = re.compile(r"(\d{8})\.json")
_FIELDS = {"host": str, "pid": int, "started": str, "machine": str, "since": str, "job": str, "restarts": int}


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    started   start time of the process in clock ticks since boot; it differs if another process gets the same ``pid``
    machine   text that identifies the running system and the process namespace in which ``pid`` is valid
    since     time at which the lease was taken (UTC)
    job       cluster and number of the Slurm job; empty outside Slurm
    restarts  number of times that Slurm has restarted the job
    token     random text that no other lease contains
    """

    host: str
    pid: int
    started: str
    machine: str
    since: str
    job: str
    restarts: int
    token: str

    @classmethod
    def here(cls, env: Mapping[str, str] = os.environ) -> Holder:
        """Return the description of this process."""
        job = env.get("SLURM_JOB_ID", "")
        restarts = env.get("SLURM_RESTART_COUNT", "0")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=process_start(os.getpid()) or "",
            machine=machine(),
            since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            job=f"{env.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
            restarts=int(restarts) if restarts.isdecimal() else 0,
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job.rpartition('/')[2]}" if self.job else ""
        return printable(shorten(f"host {self.host}, process {self.pid}{job}, since {self.since}", 160))

    def lives(self, me: Holder) -> bool | None:
        """Whether the process is still running, as far as another process, ``me``, can tell. ``None``: unknown."""
        if self.machine == me.machine:
            started = process_start(self.pid)
            if started != "":
                return started is not None and started == self.started
        if self.job and self.job == me.job and self.restarts < me.restarts:
            return False
        return None


def machine() -> str:
    """Return text that is equal for processes that see the same process IDs. Without /proc, it is the host name."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()]
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(pid: int) -> str | None:
    """Return the start time of a process: ``None`` if no such process runs, "" if the time cannot be read."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # a process of another user
    except (OverflowError, OSError):
        return ""
    try:
        # The name of the program is in parentheses, and can contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]


class Lease:
    """The right to write to an output directory. Take it with :func:`take`.

    name      key and path of the directory, for messages
    renew_s   seconds between two renewals
    """

    def __init__(self, name: str, path: Path, holder: Holder, *, renew_s: float = RENEW_S):
        self.name = name
        self.path = path
        self.holder = holder
        self._renew_s = renew_s
        self._over = threading.Event()
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def confirm(self) -> None:
        """Check that this run still holds the lease. Call this method before anything is written.

        Raises :class:`~dpo_engine.errors.CheckpointError` if the lease was taken by another run, removed, or released.
        """
        if self._over.is_set() or not self._held():
            raise CheckpointError(self._lost())

    def release(self) -> None:
        """Release the lease, so that the next run need not wait. Calling this twice is safe."""
        if not self._over.is_set():
            self._over.set()
            with suppress(OSError):  # the storage may have failed, which may be why the run ended
                if _newest(self.path.parent) == self.path:
                    write_whole(self.path, _text(self.holder, released=True))

    def _held(self) -> bool:
        try:
            os.utime(self.path)  # reaches the server, whereas a directory listing may come from a cache
        except FileNotFoundError:
            return False
        except OSError:
            pass  # the storage fails, or does not support this operation
        return _newest(self.path.parent) == self.path

    def _lost(self) -> str:
        newest = holder = None
        with suppress(OSError):
            newest = _newest(self.path.parent)
            holder = _read(newest)[1] if newest else None
        if newest and newest != self.path:
            who = holder or "an unknown process"
            why = f"another run took over this directory ({who}) while this process did not respond"
        else:
            why = f"this run no longer holds the directory, because {self.path} was removed or released"
        return f"{self.name}: {why}; this run stops without writing anything more"

    def _renew(self) -> None:
        while not self._over.wait(self._renew_s):
            with suppress(OSError):  # slow or failing storage must not stop the run
                if not self._held() and not self._over.is_set():
                    _stop(self._lost())


def _stop(line: str) -> None:
    """End this process at once, because it must not write to the directory anymore."""
    try:
        sys.stderr.write(f"{shorten(printable(line))}\n")
        sys.stderr.flush()
    finally:  # exit even if nobody reads stderr anymore
        os._exit(record(CheckpointError.exit_code))


def take(
    output: Path,
    *,
    name: str = "",
    say: Callable[[str], None] = lambda line: None,
    between: Callable[[], None] = lambda: None,
    me: Holder | None = None,
    watch_s: float = WATCH_S,
    renew_s: float = RENEW_S,
) -> Lease:
    """Take the lease of an output directory for this process. Create the directory if it does not exist.

    name     key and path for messages; empty: train.output_dir and ``output``
    say      called with one line if it takes time to find out whether another run is still running
    between  called while waiting; can raise an exception to stop waiting
    me       description of this process; None: :meth:`Holder.here`
    watch_s  seconds without a renewal after which a holder on another machine counts as dead

    Raises :class:`~dpo_engine.errors.CheckpointError` if another run holds the lease. No file is left in this case.
    """
    me, name = me or Holder.here(), name or f"train.output_dir={output}"
    folder, found = output / FOLDER, None
    while True:
        last = max(filter(None, (_newest(folder), found)), default=None)
        if last is not None and (holder := _living(last, me, watch_s, say, between)) is not None:
            raise _refusal(name, holder)
        make_directory(folder)
        mine = folder / f"{_number(last) + 1:08d}.json"
        try:
            with HashedFile(mine) as file:
                file.write(_text(me))
        except FileExistsError:
            found = mine  # another run was faster; a directory that NFS has cached may not show the file yet
            continue
        except OSError:
            mine.unlink(missing_ok=True)
            raise
        sync(folder)
        if _newest(folder) == mine:
            break
        mine.unlink(missing_ok=True)  # this process was suspended, and other runs have taken the lease since
    for path in _leases(folder):
        if path != mine:
            path.unlink(missing_ok=True)
    remove_unfinished(folder)
    return Lease(name, mine, me, renew_s=renew_s)


def refuse_if_held(output: Path) -> None:
    """Raise the error of :func:`take` if a process on this machine holds the lease. Write nothing, and do not wait.

    This check needs no process groups and no torch, so a second start of the same run is refused within a second.
    """
    with suppress(OSError):  # take() reports a directory that cannot be read
        last = _newest(output / FOLDER)
        _, holder, released = _read(last) if last else (None, None, True)
        if not released and holder is not None and holder.lives(Holder.here()):
            raise _refusal(f"train.output_dir={output}", holder)


def _refusal(name: str, holder: Holder | str) -> CheckpointError:
    return CheckpointError(
        f"{name}: another run is writing there ({holder}); stop it, wait until it ends, or set another "
        f"{name.partition('=')[0]}"
    )


def _living(
    path: Path, me: Holder, watch_s: float, say: Callable[[str], None], between: Callable[[], None]
) -> Holder | str | None:
    """Return the holder (as text if unknown), or None if the holder is dead or the lease was released or removed."""
    pause, longest = POLL_S
    first, since, slowest, told = None, 0.0, 0.0, False
    while True:
        between()
        began = time.monotonic()
        try:
            state, holder, released = _read(path)
        except FileNotFoundError:
            return None
        now = time.monotonic()
        slowest = max(slowest, now - began)
        if released:
            return None
        if holder is not None and (lives := holder.lives(me)) is not None:
            return holder if lives else None
        if first is None:
            first, since = state, now
        elif state != first:
            return holder or "an unknown process"
        patience = watch_s + SLOWEST_READS * slowest
        if now - since >= patience:
            return None
        if not told and now - since >= QUIET_S:
            told = True
            who = holder or "an unknown process"
            output = path.parent.parent
            say(f"{output}: was last held by another run ({who}); waiting up to {patience:.0f} s for its heartbeat")
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _read(path: Path) -> tuple[object, Holder | None, bool]:
    """Return the state (renewals change it), the holder (None: not readable yet), and whether the lease was released.

    Opening the file makes NFS ask the server for the current state of the file.
    """
    with open(path, "rb") as file:
        content, facts = file.read(LARGEST), os.fstat(file.fileno())
    state = (facts.st_mtime_ns, content)
    try:
        values = json.loads(content)
        known = {name: values[name] for name in (*_FIELDS, "token")}
        if any(type(known[name]) is not kind for name, kind in _FIELDS.items()):
            raise TypeError
        return state, Holder(**known), values.get("released") is True
    except (ValueError, LookupError, TypeError, RecursionError):
        return state, None, False


def _text(holder: Holder, *, released: bool = False) -> bytes:
    return (json.dumps({**asdict(holder), "released": released}, indent=1) + "\n").encode()


def _leases(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if _NAME.fullmatch(name)]


def _newest(folder: Path) -> Path | None:
    return max(_leases(folder), default=None)


def _number(path: Path | None) -> int:
    return int(_NAME.fullmatch(path.name)[1]) if path else 0
