"""The directories of a run's checkpoints: what makes one complete, how it appears, and how it goes.

```
checkpoints/
  step_00000008/               complete: it got this name after everything in it was on the disk
    rank_00000.safetensors     one shard of each rank
    metrics.jsonl              the run's metrics up to the step
    manifest.json              names the other files, with sizes and SHA-256, and carries its own
  step_00000008.2/             the same step saved again, because the one above is damaged; it counts first
  step_00000012.tmp.5d0c81ab/  being written by the process group of that name
  step_00000004.old.5d0c81ab/  being removed by it
  latest                       the newest, for people: nothing here reads it
```

Nothing is ever written into a directory that has its final name.
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

T = TypeVar("T")

FORMAT = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 26
HISTORY = "metrics.jsonl"
POINTER = "latest"
FACTS = {"size", "sha256"}

NAME = re.compile(r"step_(\d{8,})(?:\.(\d+))?")
LEFT_OVER = re.compile(r"step_\d{8,}(\.\d+)?\.(tmp|old)\.\w+|\.latest\.\d+\.tmp")
CONTENT = re.compile(r"rank_\d{5,}\.safetensors|metrics\.jsonl")

PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
"""Errors by which storage on a network says that it is busy or has just moved, as well as that it is broken."""
TRY_AGAIN_S = (1.0, 4.0)

FORM = {"step": int, "updates": int, "schedule": int, "layout": dict, "identity": dict, "run": dict, "files": dict}


class Damaged(CheckpointError):
    """A checkpoint is not what was written; an older one may be."""


def shard_name(rank: int) -> str:
    """The file of a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def step_of(directory: Path) -> int:
    """The step that a directory's name says."""
    return int(NAME.fullmatch(directory.name.partition(".")[0])[1])


def committed(folder: Path) -> list[Path]:
    """Every checkpoint in ``folder``, whole or damaged: by step, and of one step the one saved last behind.

    Raises :class:`~dpo_engine.errors.CheckpointError` when ``folder`` is something else than a directory.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no directory; move it away, or give another train.output_dir")
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((_age(match), path) for match, path in found if match)]


def _age(name: re.Match) -> tuple[int, int]:
    return int(name[1]), int(name[2] or 1)


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in ``folder``, ascending."""
    return sorted({step_of(path) for path in committed(folder)})


def tidy(folder: Path) -> None:
    """Make ``folder`` ready for a run: it exists, takes files, and holds nothing of writers that died.

    Raises ``OSError`` where it cannot be written to.
    """
    make_directory(folder)
    for path in list(folder.iterdir()):
        if LEFT_OVER.fullmatch(path.name):
            discard(path)
    probe = working_directory(folder, 0, f"{os.getpid()}")
    probe.mkdir()
    probe.rmdir()


def working_directory(folder: Path, step: int, run_id: str) -> Path:
    """Where a run writes the checkpoint of ``step``; no other run, and no other start of it, uses that name."""
    return folder / f"step_{step:08d}.tmp.{run_id}"


def seal(work: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a directory in which every other file is on the disk already."""
    with HashedFile(work / MANIFEST) as file:
        file.write(json.dumps({**manifest, "sha256": digest(manifest)}, indent=1).encode())
    sync(work)


def publish(work: Path) -> Path:
    """Give a sealed directory its final name, by one rename, and return it.

    A checkpoint of that step that is there keeps its name: it goes once this one is complete.
    """
    name, copies = work.name.partition(".")[0], [1]
    for path in committed(work.parent):
        if path.name.partition(".")[0] == name:
            copies.append(_age(NAME.fullmatch(path.name))[1] + 1)
    final = work.with_name(name if max(copies) == 1 else f"{name}.{max(copies)}")
    os.rename(work, final)
    sync(work.parent)
    return final


def point(directory: Path) -> None:
    """Write down which checkpoint is the newest."""
    write_whole(directory.with_name(POINTER), f"{directory.name}\n".encode())


def superseded(folder: Path, step: int, *, keep_last: int, damaged: Collection[str]) -> list[str]:
    """Names of checkpoints that go once that of ``step`` is complete, the oldest first.

    damaged  names of those that have been found so: they are not counted among the newest ``keep_last``
    """
    known = committed(folder)
    good = {step_of(path): path for path in known if path.name not in damaged and step_of(path) != step}
    kept = [good[number] for number in sorted(good)[-(keep_last - 1) :]]
    return [path.name for path in known if step_of(path) <= step and path not in kept]


def remove(folder: Path, names: Sequence[str], run_id: str) -> Iterator[Path]:
    """Remove checkpoints; yields after each. A half-removed one never has a name that counts."""
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
    """Remove a directory, or a file that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # a dying writer may still put files into it
    else:
        path.unlink(missing_ok=True)


def verify(directory: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says.

    part, parts  of the files, only every ``parts``-th is read, from the ``part``-th on; the others' sizes are compared

    Raises :class:`Damaged`; :class:`~dpo_engine.errors.CheckpointError` for one in another format.
    """
    try:
        manifest = _patiently(partial(read_manifest, directory))
        for index, (name, facts) in enumerate(sorted(manifest["files"].items())):
            _patiently(partial(_verify_file, directory / name, facts, whole=index % parts == part))
    except OSError as error:
        raise Damaged(f"{error.filename or directory}: {error.strerror or error}") from error
    return manifest


def _patiently(read: Callable[[], T]) -> T:
    """What ``read`` gives, which is called again when storage may have failed for a moment only."""
    for again_s in TRY_AGAIN_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(again_s)
    return read()


def strangers(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Names in a checkpoint's directory that its manifest does not know."""
    return sorted({path.name for path in directory.iterdir()} - {MANIFEST, *manifest["files"]})


def read_manifest(directory: Path) -> dict[str, Any]:
    """A manifest that is the one that was written for this directory. Raises as :func:`verify`, and ``OSError``."""
    path = directory / MANIFEST
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise Damaged(f"{directory}: is no directory")
    if _plain_size(path) > MANIFEST_LIMIT:
        raise Damaged(f"{path}: has more than {MANIFEST_LIMIT} bytes; it is no manifest")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: is damaged ({str(error).splitlines()[0]})") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if type(written) is int and written != FORMAT:
        raise CheckpointError(f"{path}: format {written}; this version reads {FORMAT}, use the version that wrote it")
    if written is None or manifest.pop("sha256", None) != digest(manifest):
        raise Damaged(f"{path}: is damaged: it differs from its own SHA-256")
    files = manifest.get("files")
    if any(type(manifest.get(name)) is not form for name, form in FORM.items()) or any(
        type(facts) is not dict or set(facts) != FACTS or type(facts["size"]) is not int for facts in files.values()
    ):
        raise Damaged(f"{path}: does not say what a manifest must")
    if manifest["step"] != step_of(directory):
        raise Damaged(f"{path}: is that of step {manifest['step']}")
    for name in files:
        if not CONTENT.fullmatch(name):
            raise Damaged(f"{path}: names the file {name!r}, which is none of a checkpoint's")
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of what a manifest means, however it is laid out in its file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _verify_file(path: Path, facts: dict[str, Any], *, whole: bool) -> None:
    if (size := _plain_size(path)) != facts["size"]:
        raise Damaged(f"{path}: {size} bytes, must be {facts['size']}; it is cut or replaced")
    if not whole:
        return
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    if found.hexdigest() != facts["sha256"]:
        raise Damaged(f"{path}: SHA-256 differs from the manifest's; it is damaged or another's")


def _plain_size(path: Path) -> int:
    """Size of a file that is neither a link nor anything else special."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path}: is no plain file")
    return found.st_size
