"""Make a run or an export the only writer of its directory, and check that all ranks see the same directories.

If `train.output_dir` is on a local disk of each node, the parts of a checkpoint are on different disks. Without a
check, such a run would train to its end, but its checkpoints could not be loaded. Therefore rank 0 writes a file with a
random name to each of the run's directories, and every rank looks for these files before the data is read. If a
directory that all ranks must share is not shared, the run ends with an error.

`data.cache_dir` may be on a local disk of each node, because one rank per node tokenizes for the node's other ranks. If
this directory is not shared, the log says that the data is tokenized on each node.
"""

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from dpo_engine.atomic_files import make_directory, write_whole
from dpo_engine.checkpoint.lease import Lease, take
from dpo_engine.checkpoint.load import as_checkpoint_error
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError, ConfigError, Interrupted
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.rank_guard import PER_NODE, ranks_text

LOOK_S = 10.0
"""Maximum number of seconds for which a rank looks for a file. NFS can show a new directory with a delay."""
LOOK_PER_NODE_S = 1.0
"""Maximum number of seconds for which a rank looks for a file in a directory that nodes need not share."""
POLL_S = (0.05, 1.0)
"""Initial and maximum number of seconds between two attempts to read a file."""
MOST_HOSTS = 3
"""Maximum number of hosts that an error names."""


@contextmanager
def sole_writer(
    config: Config,
    groups: ParallelGroups,
    interruption: Interruption,
    *,
    now: Callable[[str], None],
    note: Callable[[str], None],
) -> Iterator[Callable[[], None]]:
    """Hold the lease of train.output_dir during the block, and check that all ranks share the run's directories.

    now    called on rank 0 with a line that must be shown at once, because the run waits
    note   called on every rank with each line for the log

    Yields  a function that checks on rank 0 that the lease is still held (:meth:`Lease.confirm`); on the other ranks it
            does nothing

    *Collectives*: those of :func:`~dpo_engine.platform.long_work.without_time_limit`, and over world a broadcast and an
    all-gather of objects.
    Raises on all ranks: :class:`~dpo_engine.errors.CheckpointError` if another run holds the lease, or if a directory
    cannot be written; :class:`~dpo_engine.errors.ConfigError` if a directory is not shared;
    :class:`~dpo_engine.errors.Interrupted` if rank 0 received a signal while it waited for the lease.
    """
    output, world = Path(config.train.output_dir), groups.world
    first = world.rank() == 0

    def leave() -> None:
        if interruption.received:
            name = signal.Signals(interruption.received).name
            raise Interrupted(f"{name}: stopped before training a step; run the same command to start again")

    held: list[Lease] = []
    try:
        acquire = as_checkpoint_error(lambda: held.append(take(output, say=now, between=leave)), output)
        without_time_limit(world, acquire if first else lambda: None, Meter(f"taking the lease of {output}"))
        require_shared(shared_directories(config), world, note)
        yield as_checkpoint_error(held[0].confirm, output) if held else lambda: None
    finally:
        for lease in held:
            lease.release()


@contextmanager
def sole_exporter(directory: str | Path, world: dist.ProcessGroup, say: Callable[[str], None]) -> Iterator[None]:
    """Refuse to export to a directory to which another process is exporting. Rank 0 holds a lease during the block.

    Two exports to one directory would write files with the same names, and remove each other's files.

    directory  directory of the export; the lease is next to it
    say        called on rank 0 with a line if it takes time to find out whether another export still runs

    *Collectives*: those of :func:`~dpo_engine.platform.long_work.without_time_limit`.
    Raises :class:`~dpo_engine.errors.CheckpointError` on all ranks if another process is exporting to the directory, or
    if the lease cannot be written.
    """
    target = Path(directory).resolve()
    place = target.with_name(f".{target.name}.exporting")
    held: list[Lease] = []

    def acquire() -> None:
        try:
            held.append(take(place, name=f"--to={target}", say=say))
        except OSError as failure:
            raise CheckpointError(f"{target}: cannot be written ({failure}); fix this and export again") from None

    try:
        without_time_limit(world, acquire if world.rank() == 0 else lambda: None, Meter(f"taking the lease of {place}"))
        yield
    finally:
        for lease in held:
            lease.release()
            with suppress(OSError):  # another export may have taken the lease already
                lease.path.unlink()
                lease.path.parent.rmdir()
                place.rmdir()


def shared_directories(config: Config) -> dict[str, Path]:
    """Return the directories to check, by configuration key. For keys in ``PER_NODE``, a difference is only logged."""
    asked = {"train.output_dir": config.train.output_dir, "data.cache_dir": config.data.cache_dir}
    if config.reference_mode == "stored":
        asked["reference.store"] = config.reference.store
    return {key: Path(path) for key, path in asked.items() if path is not None}


def require_shared(directories: Mapping[str, Path], world: dist.ProcessGroup, note: Callable[[str], None]) -> None:
    """Check that all ranks see the same directories. With one rank, do nothing.

    *Collectives*: those of :func:`sole_writer`.
    Raises on all ranks: :class:`~dpo_engine.errors.CheckpointError` if rank 0 cannot write to a directory;
    :class:`~dpo_engine.errors.ConfigError` if a directory that all ranks must share is not shared.
    """
    if world.size() == 1:
        return
    box = [(f".shared-{secrets.token_hex(8)}.{os.getpid()}.tmp", socket.gethostname())]
    dist.broadcast_object_list(box, src=0, group=world)
    ((name, origin),) = box
    first = world.rank() == 0

    meter = Meter("checking that all ranks see the same directories")

    def leave_files() -> None:
        for directory in directories.values():
            make_directory(directory)
            write_whole(directory / name, name.encode())

    def look() -> list[str]:
        limits = {key: LOOK_PER_NODE_S if key in PER_NODE else LOOK_S for key in directories}
        return [key for key, directory in directories.items() if not _sees(directory / name, limits[key])]

    try:
        without_time_limit(world, as_checkpoint_error(leave_files, Path()) if first else lambda: None, meter)
        mine = (socket.gethostname(), without_time_limit(world, look, meter))
        found: list[tuple[str, list[str]]] = [mine] * world.size()
        dist.all_gather_object(found, mine, group=world)
    finally:
        if first:
            for directory in directories.values():
                with suppress(OSError):
                    (directory / name).unlink(missing_ok=True)
    problems = []
    for key, directory in directories.items():
        if blind := {rank: host for rank, (host, missing) in enumerate(found) if key in missing}:
            hosts = list(dict.fromkeys(blind.values()))
            more = f" and {len(hosts) - MOST_HOSTS} more" if len(hosts) > MOST_HOSTS else ""
            who = f"{', '.join(hosts[:MOST_HOSTS])}{more} ({ranks_text(list(blind))})"
            what = f"the file that rank 0 wrote there on host {origin} is not visible on {who}"
            if key in PER_NODE:
                note(f"{key}={directory}: is a different directory on {who}, so the data is tokenized there again")
            else:
                problems.append(
                    f"{key}={directory}: is not the same directory for all ranks: {what}; set a directory on storage "
                    "that all nodes share"
                )
    if problems:
        raise ConfigError(problems)


def _sees(path: Path, limit_s: float) -> bool:
    """Whether a file appears within the time limit."""
    deadline = time.monotonic() + limit_s
    pause, longest = POLL_S
    while True:
        with suppress(OSError):
            path.read_bytes()
            return True
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            # An NFS client can cache that a directory does not exist. On mkdir, the client asks the server.
            path.parent.mkdir()
        time.sleep(pause)
        pause = min(2 * pause, longest)
