"""From a raw record to preference pairs. What a record may look like is a data format, registered by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
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
    """`prompt`, `chosen` and `rejected` as texts; the responses follow the prompt as they are."""
    return Pair(*_fields(row, FIELDS, str), **facts(row))


@FORMATS.register("messages")
def messages(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as messages: the response alone, or the whole conversation with the prompt in it.

    `prompt` is a list of messages, or the text of a user's turn, or absent when chosen and rejected are whole
    conversations: then all turns but the last are the prompt.
    """
    chosen, rejected = _fields(row, FIELDS[1:], (str, list))
    prompt = _fields(row, FIELDS[:1], (str, list))[0] if "prompt" in row else None
    return Pair(prompt, chosen, rejected, **facts(row))


@FORMATS.register("hh")
def hh(row: dict[str, Any]) -> Pair:
    r"""`chosen` and `rejected` as whole dialogues, `\n\nHuman: ... \n\nAssistant: ...`, that differ in their last turn.

    The prompt is the text up to and with the last `\n\nAssistant:`, and must be the same in both.
    """
    _refuse_prompt(row)
    chosen, rejected = _fields(row, FIELDS[1:], str)
    prompt, chosen = _last_hh_turn("chosen", chosen)
    other, rejected = _last_hh_turn("rejected", rejected)
    if prompt != other:
        raise BadRecord("chosen and rejected have different prompts: they differ before the last '\\n\\nAssistant:'")
    return Pair(prompt, chosen, rejected, **facts(row))


@FORMATS.register("implicit")
def implicit(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as texts with a common start, which is the prompt.

    It ends before the last blank of the common start, so that no word is cut in two; where there is no blank in it, the
    whole of it is the prompt.
    """
    _refuse_prompt(row)
    chosen, rejected = _fields(row, FIELDS[1:], str)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    common = chosen[: min(len(chosen), len(rejected)) if same is None else same]
    words = common.rstrip() if common[-1:].isspace() else common.rsplit(None, 1)[0] if common else ""
    end = len(words if words.strip() else common)
    if not chosen[:end].strip():
        raise BadRecord("there is no prompt, and chosen and rejected have no common start that could be one")
    return Pair(chosen[:end], chosen[end:], rejected[end:], **facts(row))


def detect(row: dict[str, Any]) -> Format:
    """The format of a record by its fields. Raises :class:`BadRecord` when `chosen` or `rejected` is absent.

    Responses and scores in their place: "ranked". Any of the three fields a list: "messages". A prompt: "text". No
    prompt: "hh" where turns are marked in that way, else "implicit".
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
    """Whatever :func:`detect` says; within a file, the first record that can be used decides for all."""
    return detect(row)(row)


def read_pairs(path: str | Path, name: str = AUTO, bad: BadLines | None = None) -> Iterator[tuple[int, list[Pair]]]:
    """Line number and pairs of every record of a file that can be used; none where the format leaves a record out.

    name  of a registered format; "auto" settles on the one of the first record that can be used
    bad   where the other records go; by default the first one raises

    Raises :class:`DataError`.
    """
    bad = BadLines() if bad is None else bad
    try:
        settled: Format | None = FORMATS[name]
    except UnknownName as error:
        raise DataError(f"{path}: {error}") from error
    if name == AUTO:
        settled = None
    for line, row in read_rows(path, bad):
        try:
            read = settled or detect(row)
            found = read(row)
            pairs = [checked(pair) for pair in ([found] if isinstance(found, Pair) else found or ())]
        except BadRecord as what:
            bad.add(path, line, what)
            continue
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # a fork's format met an odd record
            bad.add(path, line, f"data format {name!r} cannot read it ({type(error).__name__}: {error})")
            continue
        settled = read
        yield line, pairs


def _fields(row: dict[str, Any], names: Sequence[str], types: Any) -> list[Any]:
    """The values of the named fields. Raises :class:`BadRecord` for an absent one, or one of another type."""
    for name in names:
        if name not in row:
            raise BadRecord(_missing(name, row))
        if not isinstance(row[name], types):
            wanted = "text" if types is str else "text or a list of messages"
            raise BadRecord(f"{name} is {kind(row[name])}, not {wanted}")
    return [row[name] for name in names]


def _missing(name: str, row: dict[str, Any]) -> str:
    others = [key for key in islice(row, FEW) if key not in FIELDS]
    near = [key for key in others if name in key.lower() or key.lower() in OTHER_NAMES[name]]
    near += difflib.get_close_matches(name, others, 1)
    if near:
        return f"field {name!r} is missing; rename {quoted(near[0])}, or register a data format that reads it"
    return f"field {name!r} is missing; the record has {', '.join(islice(row, FEW)) or 'no fields'}"


def _refuse_prompt(row: dict[str, Any]) -> None:
    if "prompt" in row:
        raise BadRecord("has a prompt, which the file's other records imply; give it in all of them or in none")


def _last_hh_turn(name: str, dialogue: str) -> tuple[str, str]:
    """Text before and of the last turn. Raises :class:`BadRecord` unless Human and Assistant speak in turn."""
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
