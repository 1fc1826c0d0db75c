"""Read Parquet and Arrow tables, and convert their rows to Python objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from dpo_engine.errors import DataError, shorten

PARQUET_ROWS = 256
UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError, pa.ArrowException)
"""Errors that occur when values are converted to Python objects, for example a date after the year 9999, invalid UTF-8
or an unknown time zone."""


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a table value that cannot be converted to a Python object.

    why  the reason, for messages
    """

    why: str


class Table(NamedTuple):
    """An open Parquet or Arrow file.

    names     names of the columns
    total     number of rows
    batches   the rows, in batches
    validate  whether the offsets at which the file's values begin must be checked before the rows are converted
    """

    names: list[str]
    total: int
    batches: Iterator[pa.RecordBatch]
    validate: bool


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """Open a .parquet file, or an .arrow file in Arrow's file format or stream format.

    Raises :class:`DataError` if the file cannot be read or is damaged. The error can also occur while rows are read.
    """
    kind = "Parquet" if path.name.endswith(".parquet") else "Arrow"
    try:
        if kind == "Parquet":
            with pa.parquet.ParquetFile(path) as file:
                batches = file.iter_batches(batch_size=PARQUET_ROWS)
                yield Table(file.schema_arrow.names, file.metadata.num_rows, batches, False)
        else:
            with pa.memory_map(str(path)) as file:
                total = sum(
                    map(len, _arrow_batches(file)[1])
                )  # each batch is a view of the file and is released immediately
                names, batches = _arrow_batches(file)
                yield Table(names, total, batches, True)
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        what = shorten(str(error).splitlines()[0], 80)
        raise DataError(f"{path}: cannot be read as {kind} ({what}); check that the file is complete") from error


def _arrow_batches(file: pa.MemoryMappedFile) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    file.seek(0)
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return reader.schema.names, map(reader.get_batch, range(reader.num_record_batches))
    file.seek(0)
    reader = pa.ipc.open_stream(file)
    return reader.schema.names, iter(reader)


def is_valid(batch: pa.RecordBatch) -> bool:
    """Return whether the offsets and the text of all rows are valid."""
    try:
        batch.validate(full=True)
    except pa.ArrowException:
        return False
    return True


def to_python(batch: pa.RecordBatch, *, validate: bool) -> list[dict[str, Any]]:
    """Convert rows to dictionaries; values that cannot be converted become :class:`Unreadable`.

    validate  whether to check the offsets first, because offsets in a damaged Arrow file may point beyond the file
    """
    if not batch.num_columns:
        return [{} for _ in range(len(batch))]
    columns = [_values(column, validate) for column in batch.columns]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pa.Array, validate: bool) -> list[Any]:
    """Convert a column to Python objects; values that cannot be converted become :class:`Unreadable`."""
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
