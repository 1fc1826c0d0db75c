"""Rows of preference files, read strictly and one at a time: JSON lines, plain or gzipped, and Parquet."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from dpo_engine.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
SHOWN = 5
PARQUET_ROWS = 256

KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


class BadRecord(Exception):
    """A record that cannot be used; the message says what is wrong with it and leaves the place to the reader."""


def kind(value: Any) -> str:
    """A JSON value's type in words."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


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
        text = f"{path}:{line}: {what}"
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
            complete = len(line) <= MAX_LINE_BYTES
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}:{number}: cannot be read on ({error}); is the file whole?") from error
        if not complete:
            bad.add(path, number, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
            continue
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
    """One line of strict JSON: an object in UTF-8 without duplicate keys, NaN, Infinity or deep nesting.

    Raises :class:`BadRecord`.
    """
    if line.startswith(codecs.BOM_UTF8):
        raise BadRecord("starts with a byte-order mark; save the file as UTF-8 without one")
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadRecord("is UTF-16; save the file as UTF-8")
    if b"\0" in line:
        raise BadRecord("holds a NUL byte; is the file UTF-16 or damaged?")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRecord(f"byte {error.start + 1} is not UTF-8") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise BadRecord(f"is nested deeper than {MAX_DEPTH} levels")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRecord(_what_is_wrong(text, error)) from error
    except ValueError as error:
        raise BadRecord("holds a number of too many digits") from error
    if not isinstance(value, dict):
        raise BadRecord(f"is {kind(value)}, not an object")
    return value


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, found without recursion."""
    depth = deepest = 0
    quoted = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif quoted:
            escaped, quoted = character == "\\", character != '"'
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _what_is_wrong(text: str, error: json.JSONDecodeError) -> str:
    """A decoder's complaint in the user's words; the decoder's own differ between Python versions."""
    rest = text[error.pos :].lstrip()
    if error.msg.startswith("Extra data"):
        what = "there is more after the end of the value; one record a line"
    elif error.msg.startswith("Unterminated string") or not rest:
        what = "it ends inside a value; is the line cut?"
    elif rest[0] == "'":
        what = "keys and texts need double quotes"
    elif error.msg.startswith("Illegal trailing comma") or (rest[0] in "]}" and text[: error.pos].rstrip()[-1:] == ","):
        what = "there is a comma behind the last item"
    else:
        what = error.msg
    return f"not JSON at column {error.pos + 1}: {what}"


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        keys = [key for key, _ in items]
        raise BadRecord(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return row


def _refuse_constant(name: str) -> float:
    raise BadRecord(f"{name} is not JSON; leave the field out")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise BadRecord(f"number {digits[:20]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


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
        what = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as Parquet ({what}); is the file whole?") from error
