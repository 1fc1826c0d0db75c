"""Files that survive a crash: what is written is on the disk before anything says so."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_S = 3600
"""Seconds after which a file that nobody has finished is taken for a dead writer's, where others may be alive."""
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")
"""The names that :func:`write_whole` gives to files before they are whole."""


def sync(path: str | Path) -> None:
    """Have the system write a file, or a directory's list of names, to its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a directory and those around it, so that their names are on the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears under its name whole or not at all, and is on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with HashedFile(temporary) as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove_unfinished(directory: Path, *, older_than_s: float = 0.0) -> None:
    """Remove what :func:`write_whole` left in a directory when it was killed.

    older_than_s   of a directory that other processes may be writing to
    """
    for left in directory.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if _UNFINISHED.fullmatch(left.name) and time.time() - left.stat().st_mtime >= older_than_s:
                left.unlink()


class HashedFile:
    """A new file, hashed while it is written; it is on the disk when its ``with`` block ends.

    size    bytes written so far
    digest  SHA-256 of them
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = open(path, "xb")  # never through a link that somebody put there

    def __enter__(self) -> "HashedFile":
        return self

    def write(self, content: bytes | memoryview) -> None:
        """Append. Raises ``OSError`` that names the file."""
        with naming(self.path):
            self._file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def flush(self) -> None:
        """Hand to the system what is buffered."""
        with naming(self.path):
            self._file.flush()

    def __exit__(self, failure: type | None, *rest: object) -> None:
        try:
            if failure is None:
                self.flush()
                with naming(self.path):
                    os.fsync(self._file.fileno())
        finally:
            with naming(self.path):
                self._file.raw.close()  # without a flush: after a failure it would fail again


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an ``OSError`` of an open file the name of that file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
