"""Read preference records from JSON, Parquet and Arrow sources, block by block. JSON is parsed strictly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_engine.data.json_files import count_records_of, open_records
from dpo_engine.data.sources import SHARD, Shards, find_shards, locate
from dpo_engine.data.tables import PARQUET_ROWS, Unreadable, is_valid, open_table, to_python
from dpo_engine.errors import DataError, printable, quoted, shorten
from dpo_engine.strict_json import MORE_TEXT, BadJson, parse_object

SHOWN = 5
BLOCK_LINES = 256
BLOCK_BYTES = 2**20
CONVERTED_ROWS = 16
"""Maximum number of a table's rows that are held as Python objects at once."""
LONGEST = 110
"""Maximum number of characters of the reason in an error about a record. With file, line and advice, the error has
about 200 characters."""


class BadRecord(Exception):
    """A record that cannot be used. The message contains only the reason. The code that reads the file adds the file
    and the line."""


class TemplateFault(BadRecord):
    """A record whose text the chat template changes. This error ends the run even if bad records are skipped, because
    the problem is the template, not the record."""


@dataclass
class BadLines:
    """Handler of records that cannot be used: either the first one raises an error, or all are skipped and counted.

    skip   whether to skip and count bad records
    count  number of bad records so far
    first  the first few errors, as `file:line: problem`
    """

    skip: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, source: str | Path, place: int, what: object) -> None:
        """Count a bad record. Raises :class:`DataError` if bad records are not skipped, or for a template fault.

        place  the record's place in its source, as :func:`read_rows` yields it
        """
        if isinstance(what, TemplateFault):
            raise DataError(f"{printable(locate(source, place))}: {printable(str(what))}")
        self.count += 1
        if self.skip and len(self.first) == SHOWN:
            return
        text = f"{printable(locate(source, place))}: {shorten(printable(str(what)), LONGEST)}"
        if not self.skip:
            raise DataError(f"{text}; to skip bad records, set data.on_bad_line=skip")
        self.first.append(text)


class Row(dict[str, Any]):
    """A table record with values that cannot be converted to Python objects.

    Reading such a value raises :class:`BadRecord`. If the data format does not read the value, the record can be used.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Unreadable):
            raise BadRecord(f"{quoted(name)} cannot be read ({value.why})")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


@dataclass(frozen=True)
class Block:
    """Consecutive raw records of a source.

    A block holds no open file. Another process can therefore parse a copy of the block, unless `validate` is true.

    path      the source
    first     place of the first record; see :func:`read_rows`
    lines     records, as (place, content). The content is the unparsed bytes of a JSON record, a parsed row or, if the
              record is unusable, a :class:`BadRecord`
    rows      rows of a table that are not converted yet; None if there are none
    passed    number of bytes of the source that have been read, including this block; for a table, an estimate from the
              number of rows
    validate  whether the rows come from a damaged Arrow file. Offsets in such rows may point beyond the file, so each
              value is checked before it is converted, and the block must not be copied to another process
    """

    path: str | Path
    first: int = 1
    lines: tuple[tuple[int, bytes | Row | BadRecord], ...] = ()
    rows: pa.RecordBatch | None = None
    passed: int = 0
    validate: bool = False

    def to_send(self) -> Block:
        """Return a block that can be copied to another process. Rows that need checks are parsed in this process."""
        if not self.validate:
            return self
        bad = _Lines(skip=True)
        lines = [*self.records(bad), *bad.lines]
        return replace(self, lines=tuple(sorted(lines, key=lambda line: line[0])), rows=None, validate=False)

    def records(self, bad: BadLines) -> Iterator[tuple[int, dict[str, Any]]]:
        """Parse the block and yield its records with their places. `bad` collects the unusable records."""
        for place, line in self.lines:
            try:
                if isinstance(line, BadRecord):
                    raise line
                row = parse_record(line) if isinstance(line, bytes) else line
            except BadRecord as what:
                bad.add(self.path, place, what)
                continue
            yield place, row
        for place in range(0, 0 if self.rows is None else len(self.rows), CONVERTED_ROWS):
            rows = to_python(self.rows.slice(place, CONVERTED_ROWS), validate=self.validate)
            for number, row in enumerate(rows, self.first + place):
                yield number, Row(row) if any(isinstance(value, Unreadable) for value in row.values()) else row


class _Lines(BadLines):
    """Collection of unusable records with their places."""

    @property
    def lines(self) -> list[tuple[int, BadRecord]]:
        return self.__dict__.setdefault("found", [])

    def add(self, source: str | Path, place: int, what: object) -> None:
        self.lines.append((place, what if isinstance(what, BadRecord) else BadRecord(str(what))))


def read_rows(source: str | Path, bad: BadLines | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place, record) for each record of a source.

    source  a file, directory, glob, saved data set or Hub id, with or without a slice; see :func:`find_shards`
    bad     collects unusable records; by default, the first one raises :class:`DataError`

    In the first file of a source, the place is the number of the JSON line, array item or table row, counted from 1. In
    file number n, counted from 0, ``SHARD * n`` is added to this number. :func:`locate` converts a place to file and
    line.

    For memory use and other errors, see :func:`read_blocks`.
    """
    bad = BadLines() if bad is None else bad
    for block in read_blocks(source, most=1):  # with most=1, no unneeded line is read if the caller stops early
        yield from block.records(bad)


def read_blocks(source: str | Path, most: int = BLOCK_LINES) -> Iterator[Block]:
    """Yield the unparsed records of a source, in blocks of at most `most` JSON records or `PARQUET_ROWS` rows.

    The JSON records of a block take at most `BLOCK_BYTES` of memory, plus one record of at most `MAX_RECORD_BYTES`. A
    block of table rows takes at most the memory of one batch of the table. Lines with only whitespace are skipped, and
    a carriage return before the line feed is ignored.

    Raises the errors of :func:`find_shards`. Also raises :class:`DataError` if a file is damaged, if a table has two
    columns with the same name, or if the slice is empty. For a damaged file, the error is raised after the last
    readable block is yielded.
    """
    shards = find_shards(source)
    start, stop = 0, float("inf")
    if shards.part is not None:
        total = count_records(shards) if shards.part.needs_total else None
        start, stop = shards.part.bounds(total)
        if start >= stop:
            counted = "no records" if total is None else f"0 of {total:,} records"
            raise DataError(f"{source}: the slice selects {counted}; change its bounds")
    read = partial(_json_blocks, most=most) if shards.suffix.startswith(".json") else _row_blocks
    seen = passed = 0
    whole = shards.size
    for number, path in enumerate(shards.files):
        blocks = read(path, start - seen, stop - seen)
        while True:
            try:
                block = next(blocks)
            except StopIteration as end:
                seen += end.value
                break
            base = SHARD * number
            lines = tuple((base + line, content) for line, content in block.lines)
            yield replace(
                block,
                path=source,
                first=base + block.first,
                lines=lines,
                passed=min(passed + block.passed, whole),
            )
        passed += path.stat().st_size
        if seen >= stop:
            break
    if shards.part is not None and seen <= start:
        raise DataError(f"{source}: the slice selects 0 of {seen:,} records; change its bounds")


Blocks = Generator[Block, None, int]
"""The blocks of one file, with line, item or row numbers as places. The generator returns the number of records
read."""


def _json_blocks(path: Path, start: float, stop: float, most: int) -> Blocks:
    lines: list[tuple[int, bytes | BadRecord]] = []
    seen = size = 0
    damage = None
    with open_records(path) as (records, tell):

        def block() -> Block:
            return Block(path, lines[0][0], tuple(lines), passed=tell())

        try:
            for number, line in records:
                seen += 1
                if seen > start:
                    lines.append((number, BadRecord(line) if isinstance(line, str) else line))
                    size += len(line) if isinstance(line, bytes) else 0
                if len(lines) == most or size >= BLOCK_BYTES:
                    yield block()
                    lines, size = [], 0
                if seen >= stop:
                    break
        except DataError as error:
            damage = error
        if lines:
            yield block()
    if damage:
        raise damage
    return seen


def parse_record(line: bytes) -> dict[str, Any]:
    """Parse one line as strict JSON (see :mod:`dpo_engine.strict_json`). Raises :class:`BadRecord`."""
    try:
        return parse_object(line)
    except BadJson as what:
        way_out = "; write one record per line" if MORE_TEXT in str(what) else ""
        raise BadRecord(f"{what}{way_out}") from what


def _row_blocks(path: Path, start: float, stop: float) -> Blocks:
    seen, size = 0, path.stat().st_size
    with open_table(path) as table:
        twice = next((name for name, count in Counter(table.names).items() if count > 1), None)
        if twice is not None:
            raise DataError(f"{path}: has two columns named {quoted(twice)}; rename or remove one")
        for batch in table.batches:
            damaged = table.validate and not is_valid(batch)
            first, last = int(max(start - seen, 0)), int(min(stop - seen, len(batch)))
            for place in range(first, last, PARQUET_ROWS):
                rows = batch.slice(place, min(PARQUET_ROWS, last - place))
                passed = size * (seen + place + len(rows)) // max(table.total, 1)
                yield Block(path, seen + place + 1, rows=rows, passed=passed, validate=damaged)
            seen += len(batch)
            if seen >= stop:
                break
    return seen


def count_records(shards: Shards, limit: float = float("inf")) -> int | None:
    """Count the records of a source, including bad ones. The slice of the source is ignored.

    limit  maximum number of JSON bytes to read; if the source has more, return None

    Raises :class:`DataError` if a file is damaged.
    """
    count = seen = 0
    for path in shards.files:
        if not shards.suffix.startswith(".json"):
            with open_table(path) as table:
                count += table.total
            continue
        found = count_records_of(path, limit - seen)
        if found is None:
            return None
        count, seen = count + found[0], seen + found[1]
    return count
