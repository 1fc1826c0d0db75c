"""Rows of preference files, read strictly and one at a time: JSON lines, plain or gzipped, and Parquet."""

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
"""Characters that say what is wrong with a record, so that the line with its place and the way out stays within 200."""


class BadRecord(Exception):
    """A record that cannot be used; the message says what is wrong with it and leaves the place to the reader."""


@dataclass
class BadLines:
    """What becomes of records that cannot be used: the first one ends the run, or all are counted.

    skip   count them and go on
    count  how many there were
    first  the first few of them, `file:line: what`
    """

    skip: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: str | Path, line: int, what: object) -> None:
        """Raises :class:`DataError` unless bad lines are skipped."""
        text = f"{printable(str(path))}:{line}: {shorten(printable(str(what)), LONGEST)}"
        if not self.skip:
            raise DataError(f"{text}; correct the record, or set data.on_bad_line=skip")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(text)


def read_rows(path: str | Path, bad: BadLines | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a file with their numbers, from 1: lines of .jsonl and .jsonl.gz, rows of .parquet.

    bad  where lines that are no record go; by default the first one raises

    Memory is bounded by one line of `MAX_LINE_BYTES`, or `PARQUET_ROWS` rows. Lines of blanks are passed over, and a
    carriage return before the line feed is a blank.

    Raises :class:`DataError` when the file is absent, of another kind, or damaged.
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
        raise DataError(f"{path}: not a kind of file that is read; use .jsonl, .jsonl.gz or .parquet")


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
            raise DataError(f"{path}:{number}: cannot be read on ({error}); is the file whole?") from error
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
    """One line of strict JSON, as :mod:`dpo_engine.strict_json` says. Raises :class:`BadRecord`."""
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
                        bad.add(path, number, f"byte {error.start + 1} of a text is not UTF-8")
                        continue
                    yield number, row
    except (pa.ArrowException, OSError, EOFError) as error:
        what = shorten(str(error).splitlines()[0], 80)
        raise DataError(f"{path}: cannot be read as Parquet ({what}); is the file whole?") from error
