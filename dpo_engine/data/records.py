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
PARQUET_ROWS = 256
LONGEST = 110
"""Maximum length of the reason in an error about a record. With file, line and way out, the error is about 200 long."""


class BadRecord(Exception):
    """A record that cannot be used. The message is the reason only; the code that reads the file adds file and line."""


class TemplateFault(BadRecord):
    """A record whose text the chat template changes. It ends the run even if bad records are skipped, because the
    cause is the template and not the record."""


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
        """Count a bad record. Raises :class:`DataError` unless bad lines are skipped, and for a template fault."""
        if isinstance(what, TemplateFault):
            raise DataError(f"{printable(str(path))}:{line}: {printable(str(what))}")
        text = f"{printable(str(path))}:{line}: {shorten(printable(str(what)), LONGEST)}"
        if not self.skip:
            raise DataError(f"{text}; to skip bad records, set data.on_bad_line=skip")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(text)


def read_rows(path: str | Path, bad: BadLines | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a file with their numbers from 1: lines of .jsonl and .jsonl.gz, rows of .parquet.

    bad  collects lines that are not records; by default the first one raises

    Memory is bounded by one line of `MAX_LINE_BYTES`, or by `PARQUET_ROWS` rows. Lines of only whitespace are
    skipped, and a carriage return before the line feed is ignored.

    Raises :class:`DataError` if the file is missing, of an unsupported type, or damaged.
    """
    path, bad = Path(path), BadLines() if bad is None else bad
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.name.endswith(".jsonl"):
        with path.open("rb") as stream:
            yield from _json_rows(path, stream, bad)
    elif path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "rb") as stream:
            yield from _json_rows(path, stream, bad)
    elif path.name.endswith(".parquet"):
        yield from _parquet_rows(path, bad)
    else:
        raise DataError(f"{path}: unsupported file type; use .jsonl, .jsonl.gz or .parquet")


def _json_rows(path: Path, stream: BinaryIO, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                bad.add(path, number, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE_BYTES)
                continue
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}:{number}: cannot read further ({error}); check that the file is complete"
            ) from error
        if not line:
            return
        if line.isspace():
            continue
        try:
            row = parse_record(line)
        except BadRecord as what:
            bad.add(path, number, what)
            continue
        yield number, row


def parse_record(line: bytes) -> dict[str, Any]:
    """Parse one line as strict JSON (see :mod:`dpo_engine.strict_json`). Raises :class:`BadRecord`."""
    try:
        return parse_object(line)
    except BadJson as what:
        raise BadRecord(str(what)) from what


def _parquet_rows(path: Path, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for place in range(len(batch)):
                    number += 1
                    try:
                        row = batch.slice(place, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        bad.add(path, number, f"byte {error.start + 1} of a text value is not UTF-8")
                        continue
                    yield number, row
    except (pa.ArrowException, OSError, EOFError) as error:
        what = shorten(str(error).splitlines()[0], 80)
        raise DataError(f"{path}: cannot be read as Parquet ({what}); check that the file is complete") from error
