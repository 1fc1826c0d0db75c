"""Show the tokens of a run's pairs, as text or as token strings. Each token has a kind, such as `cut` or `scored`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dpo_engine.checkpoint.best import criterion, ranking
from dpo_engine.checkpoint.directory import steps
from dpo_engine.config.run import Config, import_plugins
from dpo_engine.config.sections import Source
from dpo_engine.data.dataset import TokenPair
from dpo_engine.data.encode import Encoded, Limits, encode_pairs
from dpo_engine.data.formats import read_pairs
from dpo_engine.data.pair import Pair
from dpo_engine.data.records import BadLines, BadRecord
from dpo_engine.data.sources import locate
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.errors import ConfigError, printable
from dpo_engine.reporting.sinks import metrics_file, read_metrics
from dpo_engine.training.run_data import open_tokenizer, with_template_date

STYLES = {"cut": "red strike", "prompt": "cyan", "shared": "yellow", "scored": "green", "not scored": "dim"}
"""Kinds of tokens, each with its style on a terminal."""
MEANING = {
    "cut": "removed from the start of the prompt",
    "prompt": "the prompt, not scored",
    "shared": "scored; the same in both responses up to here",
    "scored": "scored",
    "not scored": "a turn of the response that is not scored",
}


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind.

    kind    a key of `STYLES`
    text    the decoded tokens
    tokens  the token strings
    """

    kind: str
    text: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Inspected:
    """A pair as the run uses it. If the run does not use a pair or a record, ``note`` gives the reason.

    place     `file:line` of the record
    prompt, chosen, rejected   the pieces of the prompt and of both responses
    note      why the run does not use the pair or the record; empty if the run uses the pair
    """

    place: str
    prompt: tuple[Piece, ...] = ()
    chosen: tuple[Piece, ...] = ()
    rejected: tuple[Piece, ...] = ()
    note: str = ""


def inspect(config: Config, pairs: int = 3) -> list[Inspected]:
    """Return the first pairs of data.train, at most ``pairs`` of them. Needs no Megatron.

    Unusable records are included, each with the reason, regardless of data.on_bad_line. They count toward ``pairs``.

    Raises :class:`~dpo_engine.errors.ConfigError` for a tokenizer, template or plugin that cannot be used;
    :class:`~dpo_engine.errors.DataError` for a file that cannot be read.
    """
    if problems := import_plugins(config.plugins):
        raise ConfigError(problems)
    config = with_template_date(config)
    tokenizer = open_tokenizer(config)
    return list(islice(_all(config, tokenizer), pairs))


def _all(config: Config, tokenizer: Tokenizer) -> Iterator[Inspected]:
    limits = Limits.of(config.data)
    for source in config.data.train:
        for line, found in _records(source):
            if isinstance(found, str):
                yield Inspected(line, note=found)
                continue
            unlimited = dataclasses.replace(limits, max_length=2**31, max_prompt_length=None, score="response")
            whole, fitted = (encode_pairs([found], tokenizer, kind, source=0)[0] for kind in (unlimited, limits))
            yield _inspected(line, whole, fitted, limits, tokenizer)


def _records(source: Source) -> Iterator[tuple[str, Pair | str]]:
    """Yield each pair of a source, with the `file:line` of the pair's record.

    If a record cannot be used, or if the data format leaves it out, yield the reason instead of a pair.
    """
    bad = _Reasons(skip=True)
    for line, found in read_pairs(source.path, source.format, bad, source.columns):
        yield from bad.take()
        for pair in found:
            yield locate(source.path, line), pair
        if not found:
            yield locate(source.path, line), "left out by the data format"
    yield from bad.take()


class _Reasons(BadLines):
    """Unusable records with their reasons, in the order of the file."""

    def add(self, path: object, line: int, what: object) -> None:
        self.__dict__.setdefault("reasons", []).append((locate(str(path), line), str(what)))

    def take(self) -> list[tuple[str, str]]:
        return self.__dict__.pop("reasons", [])


def _inspected(
    place: str, whole: Encoded | BadRecord, fitted: Encoded | BadRecord, limits: Limits, tokenizer: Tokenizer
) -> Inspected:
    for result in (whole, fitted):
        if isinstance(result, BadRecord):
            return Inspected(place, note=str(result))
    pair, kept = whole.pair, fitted.pair
    if pair is None:
        return Inspected(place, note=f"dropped: {whole.dropped}")
    scores_all = limits.score == "all"
    cut = 0
    if kept is not None:
        cut = len(pair.prompt) - (len(kept.prompt) + len(kept.chosen) - len(pair.chosen))
    prompt = ["cut"] * cut + ["prompt"] * (len(pair.prompt) - cut)
    if scores_all:
        prompt[cut + 1 :] = ["scored"] * (len(prompt) - cut - 1)
    same = _shared(pair)
    parts = [_pieces(pair.prompt, prompt, tokenizer)]
    for ids, mask in ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask)):
        scored = np.ones(len(ids), dtype=bool) if mask is None or scores_all else mask
        kinds = [("shared" if i < same else "scored") if one else "not scored" for i, one in enumerate(scored)]
        parts.append(_pieces(ids, kinds, tokenizer))
    return Inspected(place, *parts, note=f"dropped: {fitted.dropped}" if kept is None else "")


def _shared(pair: TokenPair) -> int:
    """Return the length of the common prefix of both responses, in tokens."""
    end = min(len(pair.chosen), len(pair.rejected))
    differ = np.flatnonzero(pair.chosen[:end] != pair.rejected[:end])
    return int(differ[0]) if len(differ) else end


def _pieces(ids: np.ndarray, kinds: Sequence[str], tokenizer: Tokenizer) -> tuple[Piece, ...]:
    edges = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    found = []
    for start, stop in zip(edges, [*edges[1:], len(kinds)], strict=True):
        names = tuple(tokenizer.name_of(token) for token in ids[start:stop])
        found.append(Piece(kinds[start], tokenizer.decode(ids[start:stop]), names))
    return tuple(found)


def saved_line(config: Config) -> str | None:
    """Return a line with the run's checkpoints and the best one, according to `criterion`; None without checkpoints."""
    if not (there := steps(config.checkpoint_dir)):
        return None
    line = f"checkpoints: steps {', '.join(map(str, there))}"
    ranked = ranking(read_metrics(metrics_file(config)), criterion(config), there)
    return f"{line}; best by {criterion(config)}: {ranked[0]}" if ranked else line


def lines(pair: Inspected, *, tokens: bool = False) -> Iterator[tuple[str, str]]:
    """Yield ``(kind, line)`` for each line that describes a pair. ``kind`` is "" if the line contains no tokens.

    tokens   show the token strings instead of the decoded text
    """
    yield "", f"{pair.place}{': ' + pair.note if pair.note else ''}"
    for name, pieces in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        if pieces:
            total = sum(len(piece.tokens) for piece in pieces)
            yield "", f"  {name}: {total} token{'' if total == 1 else 's'}"
        for piece in pieces:
            shown = " ".join(map(repr, piece.tokens)) if tokens else repr(piece.text)
            yield piece.kind, f"    {piece.kind:>10} {len(piece.tokens):>5}  {shown}"


def show(pairs: Iterable[Inspected], terminal: Any, tokens: bool = False) -> None:
    """Print pairs, and the meaning of the kinds of tokens, on a rich console."""
    for pair in pairs:
        for kind, line in lines(pair, tokens=tokens):
            terminal.print(printable(line), style=STYLES.get(kind), markup=False)
    for kind, meaning in MEANING.items():
        terminal.print(f"{kind:>14}: {meaning}", style=STYLES[kind])
