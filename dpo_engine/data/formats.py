"""Turn raw records into preference pairs. A data format, registered by name, defines the fields of a record."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_engine.data import ranked  # noqa: F401  registers its formats
from dpo_engine.data.pair import FEW, FIELDS, FORMATS, Format, Pair, checked, facts
from dpo_engine.data.records import BadLines, BadRecord, read_rows
from dpo_engine.errors import DataError, quoted
from dpo_engine.registry import UnknownName
from dpo_engine.strict_json import kind

__all__ = ["FORMATS", "BadRecord", "Format", "Pair", "checked", "detect", "read_pairs", "read_rows"]

AUTO = "auto"
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("preferred", "accepted", "winner", "positive", "better"),
    "rejected": ("dispreferred", "declined", "loser", "negative", "worse"),
}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@FORMATS.register("text")
def text(row: dict[str, Any]) -> Pair:
    """`prompt`, `chosen` and `rejected` as text. The responses continue the prompt without a separator."""
    return Pair(*_fields(row, FIELDS, str), **facts(row))


@FORMATS.register("messages")
def messages(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as messages: the response alone, or the whole conversation including the prompt.

    `prompt` is a list of messages or the text of a user turn. It may be absent if chosen and rejected are whole
    conversations; then all turns but the last are the prompt.
    """
    chosen, rejected = _fields(row, FIELDS[1:], (str, list))
    prompt = _fields(row, FIELDS[:1], (str, list))[0] if "prompt" in row else None
    return Pair(prompt, chosen, rejected, **facts(row))


@FORMATS.register("hh")
def hh(row: dict[str, Any]) -> Pair:
    r"""`chosen` and `rejected` as whole dialogues, `\n\nHuman: ... \n\nAssistant: ...`, that differ in the last turn.

    The prompt is the text up to and including the last `\n\nAssistant:`. It must be the same in both.
    """
    _refuse_prompt(row)
    chosen, rejected = _fields(row, FIELDS[1:], str)
    prompt, chosen = _last_hh_turn("chosen", chosen)
    other, rejected = _last_hh_turn("rejected", rejected)
    if prompt != other:
        raise BadRecord("chosen and rejected have different prompts (text before the last '\\n\\nAssistant:')")
    return Pair(prompt, chosen, rejected, **facts(row))


@FORMATS.register("implicit")
def implicit(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as text with a common prefix, which is the prompt.

    The prompt ends before the last whitespace of the common prefix, so that no word is split. If the common prefix
    contains no whitespace, all of it is the prompt.
    """
    _refuse_prompt(row)
    chosen, rejected = _fields(row, FIELDS[1:], str)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    common = chosen[: min(len(chosen), len(rejected)) if same is None else same]
    words = common.rstrip() if common[-1:].isspace() else common.rsplit(None, 1)[0] if common else ""
    end = len(words if words.strip() else common)
    if not chosen[:end].strip():
        raise BadRecord("there is no prompt: no field of that name, and chosen and rejected have no common prefix")
    return Pair(chosen[:end], chosen[end:], rejected[end:], **facts(row))


def detect(row: dict[str, Any]) -> Format:
    """Choose the format of a record from its fields.

    "ranked" if it has responses and scores, but neither chosen nor rejected. Otherwise "messages" if any of prompt,
    chosen and rejected is a list; "text" if there is a prompt; "hh" if chosen and rejected contain Human and Assistant
    turns; else "implicit".

    Raises :class:`BadRecord` if `chosen` or `rejected` is missing.
    """
    if "responses" in row and "scores" in row and not {"chosen", "rejected"} & row.keys():
        return FORMATS["ranked"]
    _fields(row, FIELDS[1:], object)
    if any(isinstance(row.get(name), list) for name in FIELDS):
        return FORMATS["messages"]
    if "prompt" in row:
        return FORMATS["text"]
    marked = all(isinstance(row[name], str) and HH_TURN.search(row[name]) for name in FIELDS[1:])
    return FORMATS["hh" if marked else "implicit"]


@FORMATS.register(AUTO)
def auto(row: dict[str, Any]) -> Pair | Sequence[Pair] | None:
    """Choose the format with :func:`detect`. The first usable record of a file decides for the whole file."""
    return detect(row)(row)


def read_pairs(path: str | Path, name: str = AUTO, bad: BadLines | None = None) -> Iterator[tuple[int, list[Pair]]]:
    """Yield the line number and the pairs of every usable record of a file; no pairs if the format leaves it out.

    name  a registered format; "auto" settles on the format of the first usable record
    bad   collects unusable records; by default the first one raises

    Raises :class:`DataError`.
    """
    bad, reader = BadLines() if bad is None else bad, RecordReader(path, name)
    yield from reader.pairs(read_rows(path, bad), bad)


class RecordReader:
    """Turns the records of one file into pairs.

    settled  the format; None as long as `name` is "auto" and no usable record has been read

    Raises :class:`DataError` if there is no format `name`.
    """

    def __init__(self, path: str | Path, name: str):
        self.path, self.name = path, name
        try:
            self.settled: Format | None = None if name == AUTO else FORMATS[name]
        except UnknownName as error:
            raise DataError(f"{path}: {error}") from error

    def pairs(self, rows: Iterable[tuple[int, dict[str, Any]]], bad: BadLines) -> Iterator[tuple[int, list[Pair]]]:
        """Yield the line number and the pairs of every usable record of `rows`; `bad` collects the other records."""
        for line, row in rows:
            try:
                read = self.settled or detect(row)
                found = read(row)
                pairs = [checked(pair) for pair in ([found] if isinstance(found, Pair) else found or ())]
            except BadRecord as what:
                bad.add(self.path, line, what)
                continue
            except (LookupError, TypeError, ValueError, AttributeError) as error:  # raised by a plugin's format
                what = f"data format {self.name!r} failed on this record ({type(error).__name__}: {error})"
                bad.add(self.path, line, what)
                continue
            self.settled = read
            yield line, pairs


def _fields(row: dict[str, Any], names: Sequence[str], types: Any) -> list[Any]:
    """Return the values of the named fields. Raises :class:`BadRecord` if one is missing or of another type."""
    for name in names:
        if name not in row:
            raise BadRecord(_missing(name, row))
        if not isinstance(row[name], types):
            wanted = "text" if types is str else "text or a list of messages"
            raise BadRecord(f"{name} must be {wanted}, not {kind(row[name])}")
    return [row[name] for name in names]


def _missing(name: str, row: dict[str, Any]) -> str:
    others = [key for key in islice(row, FEW) if key not in FIELDS]
    near = [key for key in others if name in key.lower() or key.lower() in OTHER_NAMES[name]]
    near += difflib.get_close_matches(name, others, 1)
    if near:
        found = quoted(near[0])
        return f"missing field {name!r} (found {found}); rename it, or register a data format that reads it"
    return f"missing field {name!r} (found {', '.join(islice(row, FEW)) or 'no fields'})"


def _refuse_prompt(row: dict[str, Any]) -> None:
    if "prompt" in row:
        raise BadRecord("unexpected prompt: the data format reads it from chosen and rejected; use one form per file")


def _last_hh_turn(name: str, dialogue: str) -> tuple[str, str]:
    """Split off the text of the last turn. Raises :class:`BadRecord` unless Human and Assistant turns alternate."""
    turns = list(HH_TURN.finditer(dialogue))
    roles = [turn[1] for turn in turns]
    if not turns or turns[0].start() > 0 or roles[0] != "Human":
        raise BadRecord(f"{name} must start with '\\n\\nHuman:'")
    for place in range(1, len(roles)):
        if roles[place] == roles[place - 1]:
            raise BadRecord(f"{name} has two {roles[place]} turns in a row (turns {place} and {place + 1})")
    if roles[-1] != "Assistant":
        raise BadRecord(f"{name} must end with an Assistant turn")
    end = turns[-1].end()
    return dialogue[:end], dialogue[end:]
