"""Crash-safe file writes: a file gets its final name only after its complete contents are flushed to the disk."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_S = 3600
"""Minimum age, in seconds, at which an unfinished file is removed while other processes may write to its directory."""
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")
"""Matches the names of the temporary files that :func:`write_whole` creates."""


def sync(path: str | Path) -> None:
    """Flush a file or the entries of a directory to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, and flush each new directory entry to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically. The file gets its name only when it is complete and flushed to the disk."""
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

    older_than_s   minimum age of the files to remove, in seconds; must be larger than 0 if other processes may be
                   writing to the directory
    """
    for left in directory.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if _UNFINISHED.fullmatch(left.name) and time.time() - left.stat().st_mtime >= older_than_s:
                left.unlink()


class HashedFile:
    """A new file that is hashed while it is written. If its ``with`` block succeeds, the file is flushed to the disk.

    size    number of bytes written so far
    digest  SHA-256 hash of these bytes
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = open(path, "xb")  # mode "x" fails if the path exists, so a planted link is never followed

    def __enter__(self) -> "HashedFile":
        return self

    def write(self, content: bytes | memoryview) -> None:
        """Append to the file. On failure, raises ``OSError`` with the file's name."""
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
                self._file.raw.close()  # close() would flush again, which fails after a failed write


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to an ``OSError`` raised in the block. Errors of operations on open files lack this name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
