"""From a raw record to a preference pair. What a record may look like is a data format, registered by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_engine.data.conversation import Message, check_text, one_prompt
from dpo_engine.data.records import BadLines, BadRecord, kind, read_rows
from dpo_engine.errors import DataError
from dpo_engine.registry import Registry, UnknownName

__all__ = ["FORMATS", "BadRecord", "Format", "Pair", "checked", "detect", "read_pairs", "read_rows"]

AUTO = "auto"
FIELDS = ("prompt", "chosen", "rejected")
NUMBERS = ("margin", "chosen_reward", "rejected_reward", "ref_chosen_logps", "ref_rejected_logps")
REFERENCE_LOGPS = NUMBERS[3:]
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("preferred", "accepted", "winner", "positive", "better"),
    "rejected": ("dispreferred", "declined", "loser", "negative", "worse"),
}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Pair:
    """A prompt with a response that was preferred and one that was not.

    prompt    text, which the responses follow as they are; or the turns of a conversation up to a user's turn, rendered
              by the chat template
    chosen    text of the preferred response. A format may also give message lists, of the response or of the whole
              conversation, here and in `rejected`: :func:`checked` makes prompt and texts of them
    rejected  text of the other response
    weight    factor of this pair's loss, > 0
    margin    by how much chosen is better, in the unit of whoever judged; None where nobody said
    chosen_reward, rejected_reward  how good each response is, in the unit of whoever judged; None where nobody said
    ref_chosen_logps, ref_rejected_logps  summed log-probabilities under a reference that somebody scored; None where
              nobody did
    """

    prompt: str | Sequence[Message] | None
    chosen: str | Sequence[Message]
    rejected: str | Sequence[Message]
    weight: float = 1.0
    margin: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None


Format = Callable[[dict[str, Any]], Pair | None]
FORMATS = Registry("data format")
"""Functions from a raw record to a `Pair`, or to None for a record to leave out, which is counted.

A format raises :class:`BadRecord` for a record it cannot use. It need not check texts, turns, weight and margin:
:func:`checked` does, for every format.
"""


@FORMATS.register("text")
def text(row: dict[str, Any]) -> Pair:
    """`prompt`, `chosen` and `rejected` as texts; the responses follow the prompt as they are."""
    return Pair(*_fields(row, FIELDS, str), **_facts(row))


@FORMATS.register("messages")
def messages(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as messages: the response alone, or the whole conversation with the prompt in it.

    `prompt` is a list of messages, or the text of a user's turn, or absent when chosen and rejected are whole
    conversations: then all turns but the last are the prompt.
    """
    chosen, rejected = _fields(row, FIELDS[1:], (str, list))
    prompt = _fields(row, FIELDS[:1], (str, list))[0] if "prompt" in row else None
    return Pair(prompt, chosen, rejected, **_facts(row))


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
    return Pair(prompt, chosen, rejected, **_facts(row))


@FORMATS.register("implicit")
def implicit(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as texts with a common start, which is the prompt.

    It ends before the last blank of the common start, so that no word is cut in two; where there is no blank in it, the
    whole of it is the prompt.
    """
    _refuse_prompt(row)
    chosen, rejected = _fields(row, FIELDS[1:], str)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = min(len(chosen), len(rejected)) if same is None else same
    blank = re.search(r"\s+\S*\Z", chosen[:end])
    if blank and chosen[: blank.start()].strip():
        end = blank.start()
    if not chosen[:end].strip():
        raise BadRecord("there is no prompt, and chosen and rejected have no common start that could be one")
    return Pair(chosen[:end], chosen[end:], rejected[end:], **_facts(row))


def detect(row: dict[str, Any]) -> Format:
    """The format of a record by its fields. Raises :class:`BadRecord` when `chosen` or `rejected` is absent.

    Any of the three fields a list: "messages". A prompt: "text". No prompt: "hh" where turns are marked in that way,
    else "implicit".
    """
    _fields(row, FIELDS[1:], object)
    if any(isinstance(row.get(name), list) for name in FIELDS):
        return FORMATS["messages"]
    if "prompt" in row:
        return FORMATS["text"]
    marked = all(isinstance(row[name], str) and HH_TURN.search(row[name]) for name in FIELDS[1:])
    return FORMATS["hh" if marked else "implicit"]


@FORMATS.register(AUTO)
def auto(row: dict[str, Any]) -> Pair | None:
    """Whatever :func:`detect` says; within a file, the first record that can be used decides for all."""
    return detect(row)(row)


def checked(pair: Pair) -> Pair:
    """The pair with its prompt and responses checked, and message lists taken apart.

    Raises :class:`BadRecord`: texts that are null, of another type, empty, of blanks only, or not whole Unicode;
    conversations that :func:`one_prompt` refuses; equal responses; a weight or margin that is no fit number.
    """
    parts: tuple[Any, Any, Any] = (pair.prompt, pair.chosen, pair.rejected)
    if not all(isinstance(part, str) for part in parts):
        parts = one_prompt(*parts)
    prompt, chosen, rejected = parts
    for name, part in zip(FIELDS, parts, strict=True):
        if not isinstance(part, tuple):
            check_text(name, part)
    if chosen == rejected:
        raise BadRecord("chosen and rejected are the same")
    if chosen.strip() == rejected.strip():
        raise BadRecord("chosen and rejected are the same but for blanks around them")
    weight = _number("weight", pair.weight)
    if weight <= 0:
        raise BadRecord(f"weight is {weight:g}; it must be > 0")
    numbers = {name: getattr(pair, name) for name in NUMBERS}
    numbers = {name: None if value is None else _number(name, value) for name, value in numbers.items()}
    for name in REFERENCE_LOGPS:
        if numbers[name] is not None and numbers[name] > 0:
            raise BadRecord(f"{name} is {numbers[name]:g}; a log-probability is at most 0")
    return dataclasses.replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, weight=weight, **numbers)


def read_pairs(path: str | Path, name: str = AUTO, bad: BadLines | None = None) -> Iterator[tuple[int, Pair | None]]:
    """Line number and pair of every record of a file that can be used; None where the format leaves a record out.

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
            pair = read(row)
            if pair is not None:
                pair = checked(pair)
        except BadRecord as what:
            bad.add(path, line, what)
            continue
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # a fork's format met an odd record
            bad.add(path, line, f"data format {name!r} cannot read it ({type(error).__name__}: {error})")
            continue
        settled = read
        yield line, pair


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
    near = [key for key in row if key not in FIELDS and (name in key.lower() or key.lower() in OTHER_NAMES[name])]
    near += difflib.get_close_matches(name, [key for key in row if key not in FIELDS], 1)
    if near:
        return f"field {name!r} is missing; rename {near[0]!r}, or register a data format that reads it"
    return f"field {name!r} is missing; the record has {', '.join(row) or 'no fields'}"


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """Weight and numbers, null meaning absent. Raises :class:`BadRecord` for content that no format here renders."""
    for name in ("tools", "images"):
        if row.get(name):
            raise BadRecord(f"{name} are not supported")
    return {name: row[name] for name in ("weight", *NUMBERS) if row.get(name) is not None}


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


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(f"{name} is {kind(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRecord(f"{name} is {str(value)[:20]}; it must be a finite number")
    return number
