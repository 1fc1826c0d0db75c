"""Name, publish, verify, and remove checkpoint directories on disk.

A checkpoint is published when its directory has its final name. It is intact if its files match its manifest.

```
checkpoints/
  step_00000008/               published: renamed to this name after all its files were synced to disk
    rank_00000.safetensors     one shard per rank
    metrics.jsonl              the run's metrics up to this step
    manifest.json              facts about the run, the size and SHA-256 of every other file, and a SHA-256 of the
                               manifest's content
  step_00000008.2/             step 8, saved again because step_00000008 is damaged; loading tries this directory first
  step_00000012.tmp.5d0c81ab/  a checkpoint that the run with ID 5d0c81ab is writing
  step_00000004.old.5d0c81ab/  a checkpoint that the run with ID 5d0c81ab is removing
  latest                       the name of the newest checkpoint, for people; the engine never reads this file
  best                         the name of the best checkpoint (checkpoint.keep_best), in the same form as `latest`
```

Once a directory has its final name, nothing writes to it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpo_engine.atomic_files import HashedFile, make_directory, sync, write_whole
from dpo_engine.errors import CheckpointError
from dpo_engine.platform.long_work import Meter

T = TypeVar("T")

FORMAT = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 26
HISTORY = "metrics.jsonl"
POINTER = "latest"
BEST = "best"
FACTS = {"size", "sha256"}

NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")
LEFT_OVER = re.compile(r"step_\d{8,}(\.\d+)?\.(tmp|old)\.\w+|\.(latest|best)\.\d+\.tmp")
CONTENT = re.compile(r"rank_\d{5,}\.safetensors|metrics\.jsonl")

PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
"""Error numbers after which a read is retried, because busy network storage can return them temporarily."""
TRY_AGAIN_S = (1.0, 4.0)
"""Waiting time before each retry, in seconds."""

FORM = {"step": int, "updates": int, "schedule": int, "layout": dict, "identity": dict, "run": dict, "files": dict}


class Damaged(CheckpointError):
    """A checkpoint's files differ from what was saved, or cannot be read. An older checkpoint may still be intact."""


def shard_name(rank: int) -> str:
    """Return the name of the file that holds a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def step_of(directory: Path) -> int:
    """Return the step number from a checkpoint directory's name."""
    return int(NAME.fullmatch(directory.name.partition(".")[0])[1])


def committed(folder: Path) -> list[Path]:
    """Return every published checkpoint in ``folder``, intact or damaged, sorted by step and then by time of saving.

    Raises :class:`~dpo_engine.errors.CheckpointError` if ``folder`` exists but is not a directory.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a directory; move it away, or set another train.output_dir")
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((_age(match), path) for match, path in found if match)]


def _age(name: re.Match) -> tuple[int, int]:
    return int(name[1]), int(name[2] or 1)


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in ``folder``, in ascending order."""
    return sorted({step_of(path) for path in committed(folder)})


def tidy(folder: Path) -> None:
    """Prepare ``folder`` for a run: create it, remove what crashed runs left behind, and check that it is writable.

    Raises ``OSError`` if the folder is not writable.
    """
    make_directory(folder)
    for path in list(folder.iterdir()):
        if LEFT_OVER.fullmatch(path.name):
            discard(path)
    probe = working_directory(folder, 0, f"{os.getpid()}")
    probe.mkdir()
    probe.rmdir()


def working_directory(folder: Path, step: int, run_id: str) -> Path:
    """Return the directory where a run writes the checkpoint for ``step``. Each start of a run has a new ``run_id``."""
    return folder / f"step_{step:08d}.tmp.{run_id}"


def seal(work: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into ``work``. Every other file in the directory must already be synced to disk."""
    with HashedFile(work / MANIFEST) as file:
        file.write(json.dumps({**manifest, "sha256": digest(manifest)}, indent=1).encode())
    sync(work)


def copy_start(source: Path, target: Path, length: int) -> dict[str, Any]:
    """Copy the first ``length`` bytes of a file. Return the copy's size and SHA-256."""
    with HashedFile(target) as copy:
        if length:
            with open(source, "rb") as file:
                while block := file.read(min(1 << 22, length - copy.size)):
                    copy.write(block)
    return {"size": copy.size, "sha256": copy.digest.hexdigest()}


def publish(work: Path) -> Path:
    """Rename a sealed directory to its final name and return the new path.

    If the step already has a checkpoint, that checkpoint keeps its name and is removed later. The new checkpoint gets a
    name with a number, for example ``step_00000008.2``.
    """
    name, copies = work.name.partition(".")[0], [1]
    for path in committed(work.parent):
        if path.name.partition(".")[0] == name:
            copies.append(_age(NAME.fullmatch(path.name))[1] + 1)
    final = work.with_name(name if max(copies) == 1 else f"{name}.{max(copies)}")
    os.rename(work, final)
    sync(work.parent)
    return final


def point(folder: Path, newest: Path, best: Path | None) -> None:
    """Write the name of the newest checkpoint to ``latest``, and the name of the best checkpoint to ``best``.

    best   None: remove the file ``best``
    """
    write_whole(folder / POINTER, f"{newest.name}\n".encode())
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_whole(folder / BEST, f"{best.name}\n".encode())


def intact(folder: Path, damaged: Collection[str]) -> dict[int, Path]:
    """Return a mapping from each step to its newest published checkpoint that is not known to be damaged.

    damaged    names of checkpoints known to be damaged
    """
    return {step_of(path): path for path in committed(folder) if path.name not in damaged}


def superseded(
    folder: Path, step: int, *, keep_last: int, damaged: Collection[str], best: Collection[int] = ()
) -> list[str]:
    """Return the names of the published checkpoints that a new checkpoint for ``step`` replaces, oldest first.

    Remove the returned checkpoints only after the new checkpoint is published. They include every older checkpoint for
    the same step, and every damaged checkpoint for ``step`` or an earlier step. If the new checkpoint is already
    published when this function is called, they also include the new checkpoint, which the caller must not remove.

    keep_last  number of checkpoints to keep, including the checkpoint for ``step``; at least 2
    best       steps of checkpoints that are kept even if they are not among the newest
    damaged    names of checkpoints known to be damaged; they do not count toward ``keep_last``
    """
    known = committed(folder)
    good = {number: path for number, path in intact(folder, damaged).items() if number != step}
    kept = [good[number] for number in good if number in (*best, *sorted(good)[-(keep_last - 1) :])]
    return [path.name for path in known if step_of(path) <= step and path not in kept]


def remove(folder: Path, names: Sequence[str], run_id: str) -> Iterator[Path]:
    """Remove checkpoints, and yield the path of each one after it is removed.

    Before the first removal, all of these checkpoints are renamed, so that a partly removed checkpoint is never loaded.
    """
    doomed = []
    for name in names:
        doomed.append(folder / f"{name}.old.{run_id}")
        os.rename(folder / name, doomed[-1])
    if doomed:
        sync(folder)
    for path in doomed:
        discard(path)
        yield path


def discard(path: Path) -> None:
    """Remove ``path``, whether it is a directory or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # a crashing run may still be adding files
    else:
        path.unlink(missing_ok=True)


def verify(directory: Path, *, part: int = 0, parts: int = 1, meter: Meter | None = None) -> dict[str, Any]:
    """Check a checkpoint's files against its manifest, and return the manifest.

    part, parts  this call hashes every ``parts``-th file, starting at index ``part``, so that ranks can divide the
                 files among themselves; for all other files, it checks only the size
    meter        counts the bytes that are hashed

    Raises :class:`Damaged` if a file cannot be read or differs from the manifest, and
    :class:`~dpo_engine.errors.CheckpointError` if the checkpoint has a format version that the engine does not read.
    """
    try:
        manifest = _patiently(partial(read_manifest, directory))
        files = sorted(manifest["files"].items())
        meter = meter or Meter()
        meter.total = sum(facts["size"] for _, facts in files[part::parts])
        for index, (name, facts) in enumerate(files):
            _patiently(partial(_verify_file, directory / name, facts, meter if index % parts == part else None))
    except OSError as error:
        raise Damaged(f"{error.filename or directory}: {error.strerror or error}") from error
    return manifest


def _patiently(read: Callable[[], T]) -> T:
    """Return ``read()``. Retry after errors that can be temporary (:data:`PASSING`)."""
    for again_s in TRY_AGAIN_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(again_s)
    return read()


def strangers(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the names of files in a checkpoint's directory that the manifest does not list."""
    return sorted({path.name for path in directory.iterdir()} - {MANIFEST, *manifest["files"]})


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint directory.

    Raises the errors of :func:`verify`, and ``OSError`` if the manifest cannot be read.
    """
    path = directory / MANIFEST
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise Damaged(f"{directory}: is not a directory")
    if _plain_size(path) > MANIFEST_LIMIT:
        raise Damaged(f"{path}: is not a manifest, because it is larger than {MANIFEST_LIMIT} bytes")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: is damaged ({str(error).splitlines()[0]})") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if type(written) is int and written != FORMAT:
        raise CheckpointError(
            f"{path}: has format {written}, but this version of dpo-engine reads format {FORMAT}; use the version that "
            "wrote this checkpoint"
        )
    if written is None or manifest.pop("sha256", None) != digest(manifest):
        raise Damaged(f"{path}: is damaged: its content does not match the SHA-256 that it records")
    files = manifest.get("files")
    if any(type(manifest.get(name)) is not form for name, form in FORM.items()) or any(
        type(facts) is not dict or set(facts) != FACTS or type(facts["size"]) is not int for facts in files.values()
    ):
        raise Damaged(f"{path}: has missing or malformed fields")
    if manifest["step"] != step_of(directory):
        raise Damaged(f"{path}: belongs to step {manifest['step']}, not to the step in the directory's name")
    for name in files:
        if not CONTENT.fullmatch(name):
            raise Damaged(f"{path}: lists the file {name!r}, but a checkpoint never contains such a file")
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content. The formatting of the JSON text does not matter."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _verify_file(path: Path, facts: dict[str, Any], meter: Meter | None) -> None:
    """Check a file's size and, if there is a ``meter`` to count the bytes, its hash."""
    if (size := _plain_size(path)) != facts["size"]:
        raise Damaged(
            f"{path}: its size is {size} B, but must be {facts['size']} B; the file was truncated or replaced"
        )
    if meter is None:
        return
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
            meter.add(len(block))
    if found.hexdigest() != facts["sha256"]:
        raise Damaged(f"{path}: SHA-256 differs from the one in the manifest; the file is damaged or was replaced")


def _plain_size(path: Path) -> int:
    """Return the size of a regular file. Raise :class:`Damaged` for links and special files."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path}: is not a regular file")
    return found.st_size
