"""Tokenize files of preference records into a cached data set, once, in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_engine.config.sections import DataConfig, Source
from dpo_engine.data.dataset import PairDataset, TokenPair
from dpo_engine.data.encode import Limits, dropped_text
from dpo_engine.data.encode_block import CHUNK_PAIRS, EncodeBlock, Part
from dpo_engine.data.formats import FORMATS, RecordReader
from dpo_engine.data.pair_writer import Full, PairWriter
from dpo_engine.data.records import BadLines, read_blocks
from dpo_engine.data.report import Report, counted
from dpo_engine.data.sources import find_shards
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.data.workers import Unsuited, Workers, default_count
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.reporting.progress import Progress
from dpo_engine.wording import show

__all__ = ["PairDataset", "Report", "TokenPair", "build_dataset", "split_validation"]

# Part of the cache key. Increment this number whenever a change of the code makes the same records produce different
# pairs.
VERSION = 10


def build_dataset(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: DataConfig,
    cache_dir: str | Path,
    *,
    max_pairs: int | None = None,
    progress: Progress | None = None,
) -> tuple[PairDataset, Report]:
    """Open the token pairs of `sources` from the cache. If the cache lacks them, tokenize the sources first.

    The name of the cache file contains a hash of the files' content, the tokenizer, the formats, and every setting that
    affects the pairs or their ids. The file is written atomically, so the cache stays usable if the process is killed.
    Several processes may build the same file at once: they write the same bytes, and the last rename wins.
    `config.workers` is the number of processes that parse and tokenize the records; if it is None, the number depends
    on the number of cores and on the size of the source files. The content of the cache file does not depend on the
    number of processes.

    max_pairs  stop after this number of usable pairs; None means all pairs
    progress   receives, after each block, how many bytes have been read and how many pairs have been written; it may
               raise an exception to stop the work

    *Collectives*: none. If ranks share a disk, one of them should call this function before the others.

    Raises :class:`DataError` in these cases:

    - A record is bad, and bad records are not skipped. The error names file and line.
    - The chat template changes a record's text in a way that the configuration does not allow. This error is raised
      even if bad records are skipped. The error names file and line.
    - A source is missing, is damaged, or changes while it is read. The error names this source.
    - The sources contain no usable pair. The error names all sources.

    Raises :class:`ConfigError` in these cases:

    - The tokenizer lacks an EOS or a chat template that is needed, or the template exceeds its limits.
    - The cache directory is not writable.
    - A worker process dies, or the run file sets `data.workers` and workers cannot be used.
    """
    if config.add_eos and tokenizer.eos_id is None:
        raise ConfigError(
            f"data.add_eos={show(config.add_eos)}: the tokenizer of {tokenizer.path} has no EOS; use a "
            "tokenizer that has one, or set data.add_eos=false"
        )
    before = [_state(source.path) for source in sources]
    path = cache_file(cache_dir, sources, tokenizer, config, max_pairs)
    names = [source.path for source in sources]
    opened = _open(path, names)
    cached = opened is not None
    if opened is None:
        try:
            with PairWriter(path, max_pairs) as writer:
                report = _tokenize(sources, tokenizer, config, writer, progress or Progress())
                for source, state in zip(sources, before, strict=True):
                    if _state(source.path) != state:
                        raise DataError(
                            f"{source.path}: changed while it was being read; start again once it is complete"
                        )
                writer.finish(dataclasses.asdict(report))
            opened = PairDataset(path, names), report
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={cache_dir}: cannot write there ({error.strerror or error}); use a writable directory"
            ) from error
    dataset, report = opened
    report.cached = cached
    report.copies = len(dataset) - len(np.unique(dataset.digests[:, 0]))
    report.lengths = _length_statistics(dataset)
    counts = np.bincount(dataset.source_ids, minlength=len(names))
    report.sources = list(zip(names, counts.tolist(), strict=True))
    return dataset, report


def _open(path: Path, names: Sequence[str]) -> tuple[PairDataset, Report] | None:
    """Open the cached pairs. Returns None if the cache file is missing or damaged, so that it is built again."""
    try:
        dataset = PairDataset(path, names)
        return dataset, Report(**dataset.facts)
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError):
        return None


def _tokenize(
    sources: Sequence[Source], tokenizer: Tokenizer, config: DataConfig, writer: PairWriter, progress: Progress
) -> Report:
    bad = BadLines(skip=config.on_bad_line == "skip")
    limits = Limits.of(config)
    report = Report()
    sizes = [find_shards(source.path).size for source in sources]
    count = config.workers or default_count(sum(sizes))
    chunk = CHUNK_PAIRS if writer.limit is None else 1  # with a limit, each part has one record
    with ExitStack() as stack:
        workers = None
        try:
            if count > 1:
                workers = stack.enter_context(Workers(count))
        except Unsuited as why:
            _without_workers(config, f"worker processes cannot be started ({why})")
            count = 1
        names = sources[0].path if len(sources) == 1 else f"{len(sources)} sources"
        progress.start(f"tokenizing {names} in {count} process{'es' * (count > 1)}", sum(sizes))
        stack.callback(progress.stop)
        try:
            for number, source in enumerate(sources):
                reader = RecordReader(source.path, source.format, source.columns)
                encode = EncodeBlock(tokenizer, limits, reader, number, chunk)
                for passed, parts in _encode_source(source, encode, workers, config):
                    for part in parts:
                        for path, line, what in part.bad:
                            bad.add(path, line, what)
                        _write(part, writer, report)
                    progress.update(sum(sizes[:number]) + passed, writer.count)
        except Full:
            report.stopped = True
    report.kept, report.bad, report.bad_lines = writer.count, bad.count, bad.first
    report.read += bad.count
    if not report.kept:
        files = ", ".join(source.path for source in sources)
        why = dropped_text(report.dropped)
        why += f"; {counted(report.bad, 'bad line')}, first {report.bad_lines[0]}" if report.bad else ""
        raise DataError(f"{files}: no usable pair in {counted(report.read, 'record')}{why}")
    return report


def _write(part: Part, writer: PairWriter, report: Report) -> None:
    """Write the pairs of a part, and count them. Raises :class:`Full` if there is no room for all of them.

    The pairs that fit are written before the exception is raised.
    """
    room = len(part.kept) if writer.limit is None else writer.limit - writer.count
    if part.kept and not room:
        raise Full
    if len(part.kept) > room:
        report.shared = (room, len(part.kept))
        part.limit(room)
    for one in part.kept:
        writer.add(one.pair)
        report.count(one)
    report.read += part.read
    report.dropped = dict(Counter(report.dropped) + part.dropped)
    if report.shared:
        raise Full


def _encode_source(
    source: Source, encode: EncodeBlock, workers: Workers | None, config: DataConfig
) -> Iterator[tuple[int, Iterable[Part]]]:
    """Yield the number of bytes read and the tokenized records of a source, block by block.

    Until the format is known, blocks are tokenized in this process. Meanwhile, the workers start. Without workers, this
    process tokenizes all blocks.
    """
    blocks = read_blocks(source.path)
    for block in blocks:
        yield block.passed, encode.parts(block)
        if workers and encode.reader.settled:
            try:
                workers.load(encode)
            except Unsuited as why:
                workers = _without_workers(config, f"{source.path} cannot be tokenized in worker processes ({why})")
            else:
                yield from workers.map(block.to_send() for block in blocks)


def _without_workers(config: DataConfig, why: str) -> None:
    """Return None to continue without workers. Raises :class:`ConfigError` if the run file sets `data.workers`."""
    if config.workers:
        raise ConfigError(
            f"data.workers={config.workers}: {why}; set data.workers=1, or move your own data format to a module that "
            "can be imported"
        )


def cache_file(
    cache_dir: str | Path, sources: Sequence[Source], tokenizer: Tokenizer, config: DataConfig, max_pairs: int | None
) -> Path:
    """Return the path of the cache file for :func:`build_dataset` with these arguments. Reads all source files."""
    return Path(cache_dir) / f"pairs-{_cache_key(sources, tokenizer, config, max_pairs)}.arrow"


def _cache_key(
    sources: Sequence[Source], tokenizer: Tokenizer, config: DataConfig, max_pairs: int | None = None
) -> str:
    """Hash everything that determines the pairs, their ids and their order."""
    facts = {
        "version": VERSION,
        "sources": [
            [*_content(source.path), source.format, source.columns, _format_digest(source)] for source in sources
        ],
        "tokenizer": tokenizer.digest,
        "limits": dataclasses.astuple(Limits.of(config)),
        "rows": tokenizer.rows,
        "on_bad_line": config.on_bad_line,
        "max_pairs": max_pairs,
    }
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _content(source: str) -> tuple[list[str], Any]:
    """Hash the files of a source, in order. Returns the hashes and the source's slice."""
    shards = find_shards(source)
    part = dataclasses.astuple(shards.part) if shards.part else None
    return [_content_digest(path) for path in shards.files], part


def _content_digest(path: str | Path) -> str:
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _format_digest(source: Source) -> str:
    """Hash the module that defines a plugin's format. Built-in formats are covered by `VERSION`."""
    module = getattr(FORMATS.get(source.format), "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    return "" if ours or file is None else _content_digest(file)


def _state(source: str) -> list[tuple[str, int, int, int]]:
    """Return the state of a source's files. The state changes if a file is added, removed or modified."""
    files = find_shards(source).files
    try:
        states = [path.stat() for path in files]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror or error}") from error
    return [(str(path), at.st_ino, at.st_size, at.st_mtime_ns) for path, at in zip(files, states, strict=True)]


def _length_statistics(dataset: PairDataset) -> dict[str, tuple[int, int, int]]:
    prompt, chosen, rejected = dataset.lengths.T
    columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "row": prompt + np.maximum(chosen, rejected)}
    return {
        name: (int(np.median(column)), int(np.quantile(column, 0.95)), int(column.max()))
        for name, column in columns.items()
    }


def split_validation(dataset: PairDataset, fraction: float) -> tuple[PairDataset, PairDataset]:
    """Hold out a share of the prompts, about `fraction`, with all of their pairs. Return views for training and
    validation.

    A hash of the prompt's text decides whether a pair is held out. Pairs with the same prompt are therefore in the same
    view. The chat template, the tokenizer and the other pairs do not affect the decision.

    Raises :class:`ConfigError` if one of the views would be empty.
    """
    held = dataset.prompt_texts.view(np.uint64) / 2.0**64 < fraction
    if held.all() or not held.any():
        raise ConfigError(
            f"data.validation_fraction={fraction:g}: holds out {held.sum()} of {counted(len(dataset), 'pair')}; use "
            "another fraction, or set data.validation to a file"
        )
    return dataset.subset(np.flatnonzero(~held)), dataset.subset(np.flatnonzero(held))
