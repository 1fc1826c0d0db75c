"""Read sources of preference records strictly, one record at a time: JSON lines, Parquet and Arrow."""

from __future__ import annotations

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from dpo_engine.data.sources import SHARD, Shards, find_shards, locate
from dpo_engine.errors import DataError, printable, quoted, shorten
from dpo_engine.strict_json import BadJson, parse_object

MAX_LINE_BYTES = 16 * 2**20
SHOWN = 5
PARQUET_ROWS = 256
CONVERTED_ROWS = 16
"""Rows of a table that are held as Python objects at once."""
UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError, pa.ArrowException)
"""Errors of a conversion to Python objects: a date after the year 9999, text that is not UTF-8, an unknown zone."""
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

    def add(self, source: str | Path, place: int, what: object) -> None:
        """Count a bad record. Raises :class:`DataError` unless bad lines are skipped.

        place  the record's place in its source, from :func:`read_rows`
        """
        self.count += 1
        if self.skip and len(self.first) == SHOWN:
            return
        text = f"{printable(locate(source, place))}: {shorten(printable(str(what)), LONGEST)}"
        if not self.skip:
            raise DataError(f"{text}; to skip bad records, set data.on_bad_line=skip")
        self.first.append(text)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value of a table that Python cannot hold.

    why  the reason, for messages
    """

    why: str


class Row(dict[str, Any]):
    """A record of a table with values that Python cannot hold. They do no harm unless they are read.

    Raises :class:`BadRecord` when such a value is read.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Unreadable):
            raise BadRecord(f"{quoted(name)} cannot be read ({value.why})")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def read_rows(source: str | Path, bad: BadLines | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a source with their places: the line of a JSON file or the row of a table, from 1.

    source  a file, directory, glob or saved data set, with or without a slice; see :func:`find_shards`. In shard
            number n, from 0, the places start at ``SHARD * n + 1``; :func:`locate` returns file and line.
    bad     collects lines that are not records; by default the first one raises

    Memory is bounded by one line of `MAX_LINE_BYTES`, or by `PARQUET_ROWS` rows. Lines of only whitespace are
    skipped, and a carriage return before the line feed is ignored.

    Raises :class:`DataError` if a file is missing, of an unsupported type, or damaged, or if a slice is empty.
    """
    bad = BadLines() if bad is None else bad
    shards = find_shards(source)
    start, stop = 0, float("inf")
    if shards.part is not None:
        total = count_records(shards) if shards.part.needs_total else None
        start, stop = shards.part.bounds(total)
        if start >= stop:
            counted = "" if total is None else f" of the {total:,}"
            raise DataError(f"{source}: the slice selects no record{counted}; change its bounds")
    seen = 0
    for number, path in enumerate(shards.files):
        read = _read_lines if shards.suffix.startswith(".jsonl") else _read_table
        rows = read(path, max(start - seen, 0), stop - seen)
        while True:
            try:
                line, row = next(rows)
            except StopIteration as end:
                seen += end.value
                break
            if isinstance(row, BadRecord):
                bad.add(source, SHARD * number + line, row)
            else:
                yield SHARD * number + line, row
        if seen >= stop:
            break
    if 0 < seen <= start:
        raise DataError(f"{source}: the slice selects no record of the {seen:,}; change its bounds")


Rows = Generator[tuple[int, "dict[str, Any] | BadRecord"], None, int]
"""Records of one file with their lines or rows. It returns the number of records that it has passed."""


def _read_lines(path: Path, start: float, stop: float) -> Rows:
    seen = 0
    with _open_lines(path) as stream:
        for number, line in _lines(path, stream):
            seen += 1
            if seen > start:
                try:
                    yield number, BadRecord(line) if isinstance(line, str) else parse_record(line)
                except BadRecord as what:
                    yield number, what
            if seen >= stop:
                break
    return seen


@contextmanager
def _open_lines(path: Path) -> Iterator[BinaryIO]:
    if path.name.endswith(".zst"):
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as stream:
            yield stream


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes | str]]:
    """Yield the lines that are not blank with their numbers; in place of a line that is too long, the reason."""
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE_BYTES)
                yield number, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"
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


def _read_table(path: Path, start: float, stop: float) -> Rows:
    seen = 0
    foreign = path.name.endswith(".arrow")
    with _open_table(path) as (names, batches):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"{path}: has two columns named {quoted(twice)}; rename or remove one")
        for batch in batches:
            first, last = int(max(start - seen, 0)), int(min(stop - seen, len(batch)))
            for place in range(first, last, CONVERTED_ROWS):
                rows = batch.slice(place, min(CONVERTED_ROWS, last - place))
                yield from enumerate(_to_python(rows, validate=foreign), seen + place + 1)
            seen += len(batch)
            if seen >= stop:
                break
    return seen


@contextmanager
def _open_table(path: Path) -> Iterator[tuple[list[str], Iterator[pa.RecordBatch]]]:
    """Open a Parquet or Arrow file: the names of its columns, and its rows in batches."""
    kind = "Parquet" if path.name.endswith(".parquet") else "Arrow"
    try:
        if kind == "Parquet":
            with pa.parquet.ParquetFile(path) as file:
                yield file.schema_arrow.names, file.iter_batches(batch_size=PARQUET_ROWS)
        else:
            with pa.memory_map(str(path)) as file:
                if file.size() >= 6 and file.read(6) == b"ARROW1":
                    reader = pa.ipc.open_file(file)
                    yield reader.schema.names, map(reader.get_batch, range(reader.num_record_batches))
                else:
                    file.seek(0)
                    reader = pa.ipc.open_stream(file)
                    yield reader.schema.names, iter(reader)
    except (pa.ArrowException, OSError, EOFError) as error:
        what = shorten(str(error).splitlines()[0], 80)
        raise DataError(f"{path}: cannot be read as {kind} ({what}); check that the file is complete") from error


def _to_python(batch: pa.RecordBatch, *, validate: bool) -> list[dict[str, Any]]:
    """Convert rows to dictionaries, column by column, so that a column that nobody reads does no harm.

    validate  check the offsets first: those of a damaged Arrow file may point beyond its end
    """
    if not batch.num_columns:
        return [{} for _ in range(len(batch))]
    columns = [_values(column, validate) for column in batch.columns]
    bad = any(isinstance(value, Unreadable) for values in columns for value in values)
    kind = Row if bad else dict
    return [kind(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pa.Array, validate: bool) -> list[Any]:
    """Convert a column to Python objects, with :class:`Unreadable` in place of values that Python cannot hold."""
    try:
        if validate:
            column.validate(full=True)
        return column.to_pylist()
    except UNREADABLE as error:
        if len(column) > 1:
            return [value for place in range(len(column)) for value in _values(column.slice(place, 1), validate)]
        if isinstance(error, UnicodeDecodeError):
            return [Unreadable(f"byte {error.start + 1} of a text value is not UTF-8")]
        return [Unreadable(shorten(str(error).splitlines()[0], 60) if str(error) else type(error).__name__)]


def count_records(shards: Shards, limit: float = float("inf")) -> int | None:
    """Count the records of a source without its slice, including bad ones.

    limit  number of bytes of JSON after which to give up and return None

    Raises :class:`DataError` if a file is damaged.
    """
    count = seen = 0
    for path in shards.files:
        if not shards.suffix.startswith(".jsonl"):
            count += _count_rows(path)
            continue
        with _open_lines(path) as stream:
            for _, line in _lines(path, stream):
                count, seen = count + 1, seen + len(line)
                if seen > limit:
                    return None
    return count


def _count_rows(path: Path) -> int:
    if path.name.endswith(".parquet"):
        with _open_table(path), pa.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows
    with _open_table(path) as (_, batches):
        return sum(map(len, batches))
