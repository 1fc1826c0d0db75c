"""Split JSON files into raw records: the lines of a file of JSON lines, or the items of a file that is one array."""

from __future__ import annotations

import codecs
import gzip
import io
import mmap
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dpo_engine.errors import DataError

MAX_RECORD_BYTES = 16 * 2**20
ARRAYS = ".json"
"""Suffix of files that may be one array. Files with other suffixes contain lines."""
MARKS = re.compile(rb'["\[\]{},]')
STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,200}("?)', re.DOTALL)
"""The rest of a JSON string after its opening quote. Group 1 is the closing quote, or empty if the match ends after 200
escapes. This bound limits the memory that a match takes."""
ARRAY_OF_OBJECTS = re.compile(rb"\[\s*(?:\{|\Z)")
"""The start of an array of objects, or a line that contains only the opening bracket of an array."""
NO_SPACE = re.compile(rb"\S")

Records = Iterator[tuple[int, bytes | str]]
"""Pairs of a place (line number or item number, from 1) and a raw record. If a record cannot be used, a string with the
reason replaces its bytes."""


@contextmanager
def open_records(path: Path) -> Iterator[tuple[Records, Callable[[], int]]]:
    """Open a file. Yield its raw records, and a function that returns how many bytes of the file have been read.

    Lines with only whitespace are skipped. An array is mapped into memory, so it is never copied as a whole.

    Raises :class:`DataError` if an array follows a byte-order mark. Reading the records raises this error if the file
    is damaged, or if it is neither an array nor JSON lines.
    """
    if path.name.endswith(ARRAYS) and (start := _start_of_array(path)) is not None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            array = _Array(path, content, start)
            yield iter(array), lambda: array.at
    else:
        with _open_lines(path) as (stream, tell):
            yield _lines(path, stream), tell


def count_records_of(path: Path, limit: float) -> tuple[int, int] | None:
    """Return the number of raw records of a file, including unusable ones, and the number of bytes read.

    limit  maximum number of bytes to read; if there are more, return None

    Raises :class:`DataError` if the file is damaged.
    """
    count = seen = 0
    if path.name.endswith(ARRAYS) and _start_of_array(path) is not None:
        size = path.stat().st_size
        if size > limit:
            return None
        with open_records(path) as (records, _):
            return sum(1 for _ in records), size
    with _open_lines(path) as (stream, _):
        filled = False
        try:
            # Read long lines in parts of 1 MiB, so that memory and time stay bounded.
            while part := stream.readline(2**20):
                seen, filled = seen + len(part), filled or not part.isspace()
                if part.endswith(b"\n"):
                    count, filled = count + filled, False
                if seen > limit:
                    return None
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: cannot read further ({error}); check that the file is complete") from error
        return count + filled, seen


@contextmanager
def _open_lines(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    if path.name.endswith(".zst"):
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
            yield io.BufferedReader(stream), file.tell
    elif path.name.endswith(".gz"):
        with path.open("rb") as file, gzip.open(file, "rb") as stream:
            yield stream, file.tell
    else:
        with path.open("rb") as stream:
            yield stream, stream.tell


def _lines(path: Path, stream: BinaryIO) -> Records:
    number, maybe_array = 0, path.name.endswith(ARRAYS)
    while True:
        number += 1
        try:
            line = stream.readline(MAX_RECORD_BYTES + 1)
            if len(line) > MAX_RECORD_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_RECORD_BYTES)
                yield number, f"the line is longer than {MAX_RECORD_BYTES >> 20} MiB"
                continue
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}:{number}: cannot read further ({error}); check that the file is complete"
            ) from error
        if not line:
            return
        if line.isspace():
            continue
        if maybe_array and not line.rstrip().endswith(b"}"):
            raise DataError(
                f"{path}:{number}: the file is neither an array nor JSON lines; write the records as one array, "
                "[{...}, {...}], or write one record per line"
            )
        maybe_array = False
        if ARRAY_OF_OBJECTS.match(line):
            yield number, f"is a list, not an object; if the file is one array, its name must end with {ARRAYS}"
        else:
            yield number, line


def _start_of_array(path: Path) -> int | None:
    """Return the byte offset of the first bracket if the file is an array, or None if it is not.

    Raises :class:`DataError` if the array follows a byte-order mark.
    """
    with path.open("rb") as stream:
        before = 0
        while part := stream.read(4096):
            if rest := part.lstrip():
                if rest.startswith(codecs.BOM_UTF8 + b"["):
                    raise DataError(f"{path}:1: starts with a byte-order mark; save the file as UTF-8 without one")
                return before + len(part) - len(rest) if rest.startswith(b"[") else None
            before += len(part)
    return None


class _Array:
    """The items of a JSON array as raw bytes. This class finds the end of each item, but does not parse the items.

    at  byte offset after the last byte that was read
    """

    def __init__(self, path: Path, content: mmap.mmap, start: int):
        self.at = start + 1
        self._path, self._content = path, content

    def __iter__(self) -> Records:
        number, depth = 0, 1
        start = self.at
        while depth:
            mark = self._next(MARKS, number)[0]
            if mark == b'"':
                while not self._next(STRING, number)[1]:
                    pass
            elif mark in (b"[", b"{"):
                depth += 1
            elif mark in (b"]", b"}"):
                depth -= 1
            if depth == 0 and mark == b"}":
                raise DataError(
                    f"{self._path}:{number + 1}: a closing brace has no opening brace; correct the brackets and braces"
                )
            if depth == 0 or (depth == 1 and mark == b","):
                item: bytes | str
                if self.at - 1 - start > MAX_RECORD_BYTES:
                    item = f"the record is longer than {MAX_RECORD_BYTES >> 20} MiB"
                else:
                    item = self._content[start : self.at - 1].strip()
                start = self.at
                if not item and depth == 0 and number == 0:
                    break  # an empty array
                number += 1
                yield number, item or f"there is no record {'before a comma' if depth else 'after the last comma'}"
        if NO_SPACE.search(self._content, self.at):
            raise DataError(
                f"{self._path}:{number}: there is more text after the end of the array; write all records as one array"
            )

    def _next(self, pattern: re.Pattern[bytes], number: int) -> re.Match[bytes]:
        found = pattern.search(self._content, self.at)
        if found is None or found.end() == self.at:
            self.at = len(self._content)
            raise DataError(f"{self._path}:{number + 1}: the array does not end; check that the file is complete")
        self.at = found.end()
        return found
