"""Read preference files strictly, one row at a time: JSON lines, plain or gzipped, and Parquet."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from dpo_engine.errors import DataError, printable, shorten
from dpo_engine.strict_json import BadJson, parse_object

MAX_LINE_BYTES = 16 * 2**20
SHOWN = 5
BLOCK_LINES = 256
BLOCK_BYTES = 2**20
PARQUET_ROWS = 256
LONGEST = 110
"""Maximum length of the reason in an error about a record. With file, line and way out, the error is about 200 long."""


class BadRecord(Exception):
    """A record that cannot be used. The message is the reason only; the code that reads the file adds file and line."""


@dataclass
class BadLines:
    """Collects records that cannot be used: either the first one raises, or all are skipped and counted.

    skip   skip and count them
    count  number of them so far
    first  the first few, as `file:line: what`
    """

    skip: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: str | Path, line: int, what: object) -> None:
        """Count a bad record. Raises :class:`DataError` unless bad lines are skipped."""
        text = f"{printable(str(path))}:{line}: {shorten(printable(str(what)), LONGEST)}"
        if not self.skip:
            raise DataError(f"{text}; to skip bad records, set data.on_bad_line=skip")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(text)


@dataclass(frozen=True)
class Block:
    """Consecutive raw records of a file. It holds no open file, so another process can parse it.

    path    the file
    first   number of the first record, from 1
    lines   JSON lines that are not parsed yet, with their numbers; a :class:`BadRecord` in place of an unusable line
    rows    rows of a Parquet file; None for JSON lines
    passed  bytes of the file that have been read, including this block
    """

    path: Path
    first: int = 1
    lines: tuple[tuple[int, bytes | BadRecord], ...] = ()
    rows: pa.RecordBatch | None = None
    passed: int = 0

    def records(self, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
        """Parse the block and yield its records with their numbers. `bad` collects those that are not records."""
        for number, line in self.lines:
            try:
                if isinstance(line, BadRecord):
                    raise line
                row = parse_record(line)
            except BadRecord as what:
                bad.add(self.path, number, what)
                continue
            yield number, row
        for place in range(0 if self.rows is None else len(self.rows)):
            try:
                row = self.rows.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                bad.add(self.path, self.first + place, f"byte {error.start + 1} of a text value is not UTF-8")
                continue
            yield self.first + place, row


def read_rows(path: str | Path, bad: BadLines | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a file with their numbers from 1: lines of .jsonl and .jsonl.gz, rows of .parquet.

    bad  collects lines that are not records; by default the first one raises

    Memory and Raises: as for :func:`read_blocks`.
    """
    bad = BadLines() if bad is None else bad
    for block in read_blocks(path):
        yield from block.records(bad)


def read_blocks(path: str | Path) -> Iterator[Block]:
    """Yield the content of a file, not parsed, in blocks of at most `BLOCK_LINES` lines or `PARQUET_ROWS` rows.

    Memory is bounded by one line of `MAX_LINE_BYTES` more than `BLOCK_BYTES`, or by `PARQUET_ROWS` rows. Lines of only
    whitespace are skipped, and a carriage return before the line feed is ignored.

    Raises :class:`DataError` if the file is missing, of an unsupported type, or damaged; if it is damaged, after the
    last block that can be read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.name.endswith(".jsonl"):
        with path.open("rb") as stream:
            yield from _line_blocks(path, stream, stream)
    elif path.name.endswith(".jsonl.gz"):
        with path.open("rb") as file, gzip.open(file, "rb") as stream:
            yield from _line_blocks(path, stream, file)
    elif path.name.endswith(".parquet"):
        yield from _row_blocks(path)
    else:
        raise DataError(f"{path}: unsupported file type; use .jsonl, .jsonl.gz or .parquet")


def _line_blocks(path: Path, stream: BinaryIO, file: BinaryIO) -> Iterator[Block]:
    """Group the lines of `stream`. `file` is the file that it reads from, which may be compressed."""
    lines: list[tuple[int, bytes | BadRecord]] = []
    size = 0
    damage = None
    try:
        for number, line in _lines(path, stream):
            lines.append((number, line))
            size += len(line) if isinstance(line, bytes) else 0
            if len(lines) == BLOCK_LINES or size >= BLOCK_BYTES:
                yield Block(path, lines[0][0], tuple(lines), passed=file.tell())
                lines, size = [], 0
    except DataError as error:
        damage = error
    if lines:
        yield Block(path, lines[0][0], tuple(lines), passed=file.tell())
    if damage:
        raise damage


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes | BadRecord]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE_BYTES)
                yield number, BadRecord(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}:{number}: cannot read on ({error}); check that the file is complete") from error
        if not line:
            return
        if not line.isspace():
            yield number, line


def parse_record(line: bytes) -> dict[str, Any]:
    """Parse one line as strict JSON (see :mod:`dpo_engine.strict_json`). Raises :class:`BadRecord`."""
    try:
        return parse_object(line)
    except BadJson as what:
        raise BadRecord(str(what)) from what


def _row_blocks(path: Path) -> Iterator[Block]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            size, total, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                first, done = done + 1, done + len(batch)
                yield Block(path, first, rows=batch, passed=size * done // max(1, total))
    except (pa.ArrowException, OSError, EOFError) as error:
        what = shorten(str(error).splitlines()[0], 80)
        raise DataError(f"{path}: cannot be read as Parquet ({what}); check that the file is complete") from error
