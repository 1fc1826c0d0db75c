"""Crash-safe file writes: every file is flushed to the disk, and appears under its name only when complete."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_S = 3600
"""Age in seconds after which an unfinished file is removed, in directories that other processes may be writing to."""
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")
"""The temporary file names of :func:`write_whole`."""


def sync(path: str | Path) -> None:
    """Flush a file, or a directory's entries, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, and flush their names to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: it gets its name only when complete, and is on the disk when this returns."""
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
    """Remove the temporary files that a killed :func:`write_whole` left in a directory.

    older_than_s   minimum age in seconds; larger than 0 if other processes may be writing to the directory
    """
    for left in directory.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if _UNFINISHED.fullmatch(left.name) and time.time() - left.stat().st_mtime >= older_than_s:
                left.unlink()


class HashedFile:
    """A new file that is hashed while it is written, and flushed to the disk at the end of its ``with`` block.

    size    bytes written so far
    digest  SHA-256 of them
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = open(path, "xb")  # "x" refuses existing names, so it does not follow a planted link

    def __enter__(self) -> "HashedFile":
        return self

    def write(self, content: bytes | memoryview) -> None:
        """Append to the file. Raises ``OSError`` that names the file."""
        with naming(self.path):
            self._file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def flush(self) -> None:
        """Pass buffered data to the operating system."""
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
                self._file.raw.close()  # close() would flush, and fail again after a failed write


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to an ``OSError`` that was raised by an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
