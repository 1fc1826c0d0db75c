"""Convert blocks of raw records to token pairs, in this process or in a worker process."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpo_engine.data.encode import LEFT_OUT, Encoded, Limits, encode_pairs
from dpo_engine.data.formats import Pair, RecordReader
from dpo_engine.data.records import BadLines, BadRecord, Block
from dpo_engine.data.tokenizer import Tokenizer

CHUNK_PAIRS = 256
CHUNK_CHARACTERS = 2**20


@dataclass
class Part:
    """The result of tokenizing some records of a source.

    kept    the token pairs, in the order of the source
    bad     source, place and reason for each record that cannot be used, in the order of the source
    read    number of usable records
    dropped number of dropped pairs by reason; each record that the data format leaves out counts as one pair
    """

    kept: list[Encoded]
    bad: list[tuple[str | Path, int, BadRecord]]
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def limit(self, most: int) -> None:
        """Keep at most `most` pairs of a part that has one record. The kept pairs share the record's whole weight."""
        kept = self.kept[:most]
        factor = len(self.kept) / len(kept)
        self.kept = [replace(one, pair=one.pair._replace(weight=one.pair.weight * factor)) for one in kept]


class _Unusable(BadLines):
    """List of unusable records. They are counted by the process that reads the source, because each worker sees only a
    part of the source."""

    def __init__(self) -> None:
        super().__init__(skip=True)
        self._found: list[tuple[str | Path, int, BadRecord]] = []

    def add(self, path: str | Path, line: int, what: object) -> None:
        self._found.append((path, line, what if isinstance(what, BadRecord) else BadRecord(str(what))))

    def take(self) -> list[tuple[str | Path, int, BadRecord]]:
        """Return the collected records, in the order of their lines, and empty the list."""
        found, self._found = sorted(self._found, key=lambda one: one[1]), []
        return found


@dataclass
class EncodeBlock:
    """Callable that converts blocks of raw records of one source to token pairs, in this process or in a worker.

    number  index of the source
    chunk   number of pairs to tokenize together; a chunk can have more pairs, because a record is never split
    """

    tokenizer: Tokenizer
    limits: Limits
    reader: RecordReader
    number: int
    chunk: int = CHUNK_PAIRS

    def __call__(self, block: Block) -> tuple[int, list[Part]]:
        return block.passed, list(self.parts(block))

    def parts(self, block: Block) -> Iterator[Part]:
        """Tokenize the records of a block in chunks of bounded size."""
        bad = _Unusable()
        for chunk in _chunks(self.reader.pairs(block.records(bad), bad), self.chunk):
            part = Part([], [])
            pairs = [pair for _, pairs in chunk for pair in pairs]
            encoded = iter(encode_pairs(pairs, self.tokenizer, self.limits, source=self.number))
            for line, pairs in chunk:
                results = list(itertools.islice(encoded, len(pairs)))
                unfit = next((result for result in results if isinstance(result, BadRecord)), None)
                if unfit:  # the record counts as bad, so its other pairs are not kept either
                    bad.add(block.path, line, unfit)
                    continue
                part.read += 1
                part.dropped[LEFT_OUT] += not pairs
                part.dropped.update(result.dropped for result in results if result.pair is None)
                kept = [(given, result) for given, result in zip(pairs, results, strict=True) if result.pair]
                for given, result in kept:
                    weight = result.pair.weight * given.divided / len(kept) if given.divided > 1 else result.pair.weight
                    part.kept.append(replace(result, pair=result.pair._replace(line=line, weight=weight)))
            part.bad = bad.take()
            yield part
        yield Part([], bad.take())


def _chunks(records: Iterator[tuple[int, list[Pair]]], most: int) -> Iterator[list[tuple[int, list[Pair]]]]:
    """Group records into chunks. A chunk ends when its number of pairs or of characters has reached a limit."""
    chunk: list[tuple[int, list[Pair]]] = []
    size = characters = 0
    for line, pairs in records:
        chunk.append((line, pairs))
        size += max(1, len(pairs))
        for pair in pairs:
            for part in (pair.prompt, pair.chosen, pair.rejected):
                characters += len(part) if isinstance(part, str) else sum(len(turn["content"]) for turn in part)
        if size >= most or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size, characters = [], 0, 0
    if chunk:
        yield chunk
