"""Convert blocks of raw records to token pairs, in this process or in a worker process."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dpo_engine.data.dataset import TokenPair
from dpo_engine.data.encode import Limits, encode_pairs
from dpo_engine.data.formats import Pair, RecordReader
from dpo_engine.data.records import BadLines, BadRecord, Block
from dpo_engine.data.tokenizer import Tokenizer

CHUNK_PAIRS = 256
CHUNK_CHARACTERS = 2**20
LEFT_OUT = "records left out by the data format"
COUNTED = ("cut", "merged", "masked")
"""Fields of :class:`~dpo_engine.data.encode.Encoded` that the report counts under the same name."""


@dataclass
class Part:
    """The result of tokenizing some records of a source.

    pairs   the token pairs, in the order of the source
    bad     source, place and reason for each record that cannot be used, in the order of the source
    counts  number of usable records (`read`), and the numbers of pairs that the report counts, by field of the report
    dropped number of dropped pairs by reason, including records that the data format leaves out
    ends    number of pairs by the end-of-turn tokens of their responses
    faults  number of pairs whose text the chat template changes, by the kind of change
    """

    pairs: list[TokenPair]
    bad: list[tuple[str | Path, int, BadRecord]]
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class _Unusable(BadLines):
    """Collection of unusable records, which are not counted, because other processes read other parts of the source."""

    def __init__(self) -> None:
        super().__init__(skip=True)
        self._found: list[tuple[str | Path, int, BadRecord]] = []

    def add(self, path: str | Path, line: int, what: object) -> None:
        self._found.append((path, line, what if isinstance(what, BadRecord) else BadRecord(str(what))))

    def take(self) -> list[tuple[str | Path, int, BadRecord]]:
        """Remove and return the records found, in the order of their lines."""
        found, self._found = sorted(self._found, key=lambda one: one[1]), []
        return found


@dataclass
class EncodeBlock:
    """Conversion of blocks of raw records of one source to token pairs, in this process or in a worker.

    number  index of the source
    chunk   number of pairs to tokenize together
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
                if unfit:  # also skip the record's other pairs, because all of them share its weight
                    bad.add(block.path, line, unfit)
                    continue
                part.counts["read"] += 1
                part.dropped[LEFT_OUT] += not pairs
                kept = sum(result.pair is not None for result in results)
                for given, result in zip(pairs, results, strict=True):
                    if result.pair is None:
                        part.dropped[result.dropped] += 1
                        continue
                    weight = result.pair.weight * given.divided / kept if given.divided > 1 else result.pair.weight
                    part.pairs.append(result.pair._replace(line=line, weight=weight))
                    part.counts.update({name: int(getattr(result, name)) for name in COUNTED})
                    part.ends[" and ".join(sorted(result.ends)) or "no end token"] += 1
                    part.faults.update(result.faults)
            part.bad = bad.take()
            yield part
        yield Part([], bad.take())


def _chunks(records: Iterator[tuple[int, list[Pair]]], most: int) -> Iterator[list[tuple[int, list[Pair]]]]:
    """Group records into chunks with bounded numbers of pairs and characters; the last record may exceed a bound."""
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
