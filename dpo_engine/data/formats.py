"""Turn raw records into preference pairs. A data format, registered by name, defines the fields of a record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_engine.data import foreign_formats, ranked  # noqa: F401  both register formats
from dpo_engine.data.columns import facts, is_empty, opens, renamed, target_problems, with_system
from dpo_engine.data.fields import required
from dpo_engine.data.hidden_prompts import refuse_hidden_prompt, refuse_labels, refuse_second_prompt
from dpo_engine.data.pair import FIELDS, FORMATS, Format, Pair, checked
from dpo_engine.data.records import BadLines, BadRecord, read_rows
from dpo_engine.data.repeated_prompts import refuse_repeated_prompt
from dpo_engine.errors import DataError
from dpo_engine.registry import UnknownName

__all__ = ["FORMATS", "BadRecord", "Format", "Pair", "checked", "detect", "read_pairs", "read_rows", "recognize"]

AUTO = "auto"
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
EARLIER = ("history", "context")
"""Fields with text or turns that come before the prompt."""


@FORMATS.register("text", fields=FIELDS)
def text(row: dict[str, Any]) -> Pair:
    """`prompt`, `chosen` and `rejected` as text. The responses continue the prompt without a separator."""
    return Pair(*required(row, FIELDS, str), **facts(row, conversation=False))


@FORMATS.register("messages", fields=FIELDS)
def messages(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as messages: the response alone, or the whole conversation including the prompt.

    `prompt` is a list of messages or the text of a user turn. If chosen and rejected are whole conversations, `prompt`
    may be absent; the prompt then consists of the first turns that both have in common. A response may also be one
    message or the text of an assistant turn. `system` is the text of a system turn at the start.
    """
    chosen, rejected = required(row, FIELDS[1:], (str, list, dict))
    prompt = required(row, FIELDS[:1], (str, list))[0] if row.get("prompt") is not None else None
    chosen, rejected = ([part] if isinstance(part, dict) else part for part in (chosen, rejected))
    prompt, chosen, rejected = with_system(row, prompt, chosen, rejected)
    if all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        prompt = [{"role": "user", "content": prompt}]
    return Pair(prompt, chosen, rejected, **facts(row, conversation=True))


@FORMATS.register("hh", fields=FIELDS[1:])
def hh(row: dict[str, Any]) -> Pair:
    r"""`chosen` and `rejected` as whole dialogues, `\n\nHuman: ... \n\nAssistant: ...`, that differ in the last turn.

    The prompt is the text up to and including the last `\n\nAssistant:`. Both dialogues must have the same prompt.
    """
    _refuse_prompt(row)
    chosen, rejected = required(row, FIELDS[1:], str)
    prompt, chosen = _last_hh_turn("chosen", chosen)
    other, rejected = _last_hh_turn("rejected", rejected)
    if prompt != other:
        raise BadRecord("chosen and rejected have different prompts (text before the last '\\n\\nAssistant:')")
    return Pair(prompt, chosen, rejected, **facts(row, conversation=False))


@FORMATS.register("implicit", fields=FIELDS[1:])
def implicit(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` as text with a common prefix, which is the prompt.

    The prompt ends before the last whitespace of the common prefix, so that no word is split. If the common prefix
    contains no whitespace, or whitespace only at its start, all of the common prefix is the prompt.
    """
    _refuse_prompt(row)
    chosen, rejected = required(row, FIELDS[1:], str)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    common = chosen[: min(len(chosen), len(rejected)) if same is None else same]
    last = [] if common[-1:].isspace() else common.rsplit(None, 1)[-1:]
    words = common.removesuffix("".join(last)).rstrip()
    end = len(words or common)
    if not chosen[:end].strip():
        raise BadRecord("missing field 'prompt', and chosen and rejected have no common prefix that can replace it")
    return Pair(chosen[:end], chosen[end:], rejected[end:], **facts(row, conversation=False))


def detect(row: dict[str, Any]) -> Format:
    """Choose the format of a record from its fields.

    The first rule that applies determines the format:

    1. The record has responses and scores, but neither chosen nor rejected: "ranked".
    2. :func:`foreign_formats.recognized` returns the name of another system's format: that format.
    3. Any of prompt, chosen and rejected is a list or an object: "messages".
    4. The record has a prompt: "text".
    5. Both chosen and rejected contain Human or Assistant turns: "hh".
    6. Otherwise: "implicit".

    Raises :class:`BadRecord` in these cases:

    - Neither of the first two rules applies, and `chosen` or `rejected` is missing.
    - `chosen` and `rejected` only refer to the fields that contain the responses.
    - Both responses are whole dialogues, which repeat the prompt.
    - The prompt ends with the header of a turn, such as `Assistant:`, and both responses begin with this header.
    - The format would ignore a field that may be the prompt or may come before the prompt.
    """
    read = _detected(row)
    refuse_second_prompt(row, [*read.fields, *EARLIER])
    return read


def _detected(row: dict[str, Any]) -> Format:
    if "responses" in row and "scores" in row and not {"chosen", "rejected"} & row.keys():
        return FORMATS["ranked"]
    if name := foreign_formats.recognized(row):
        return FORMATS[name]
    required(row, FIELDS[1:], object)
    if any(isinstance(row.get(name), (list, dict)) for name in FIELDS):
        if "prompt" not in row and not opens(row["chosen"]):
            refuse_hidden_prompt(row, "messages")
        return FORMATS["messages"]
    if "prompt" in row:
        name = "text"
    else:
        marked = all(isinstance(row[name], str) and HH_TURN.search(row[name]) for name in FIELDS[1:])
        name = "hh" if marked else "implicit"
    _refuse_unread_prompt(row, name)
    return FORMATS[name]


@FORMATS.register(AUTO)
def auto(row: dict[str, Any]) -> Pair | Sequence[Pair] | None:
    """Choose the format with :func:`detect`. A source's first usable record decides for all its records."""
    return detect(row)(row)


def read_pairs(
    path: str | Path, name: str = AUTO, bad: BadLines | None = None, columns: Mapping[str, str | None] | None = None
) -> Iterator[tuple[int, list[Pair]]]:
    """Yield the place and the list of pairs of every usable record of a source.

    The list is empty if the format leaves the record out.

    name     a registered format; "auto" uses the format of the first usable record for the whole source
    bad      collects unusable records; by default, the first one raises :class:`DataError`
    columns  `data.columns`, which maps the names that the format reads to the names in the records

    Raises the errors of :class:`RecordReader` and :func:`~dpo_engine.data.records.read_rows`.
    """
    bad, reader = BadLines() if bad is None else bad, RecordReader(path, name, columns)
    for line, _, pairs in reader.read(read_rows(path, bad), bad):
        yield line, pairs


def recognize(
    path: str | Path, name: str, columns: Mapping[str, str | None] | None, *, skip: bool
) -> tuple[str, dict[str, Any]] | None:
    """Return the name of the format that reads a source, and its first usable record with the fields renamed.

    skip  whether bad records are skipped; otherwise, a bad record raises :class:`DataError`

    Returns None if there is no usable record. Raises :class:`DataError` as :func:`read_pairs` does.
    """
    bad, reader = BadLines(skip=skip), RecordReader(path, name, columns)
    found = next(reader.read(read_rows(path, bad), bad), None)
    return found and (next(known for known, entry in FORMATS.items() if entry is reader.settled), found[1])


class RecordReader:
    """Reader that turns the records of one source into pairs.

    columns  `data.columns`, which maps the names that the format reads to the names in the records
    settled  the format; None as long as `name` is "auto" and no usable record has been read

    Raises :class:`DataError` if there is no format `name`, or if `columns` has a field that the format does not read.
    """

    def __init__(self, path: str | Path, name: str, columns: Mapping[str, str | None] | None = None):
        self.path, self.name, self.columns = path, name, columns
        try:
            self.settled: Format | None = None if name == AUTO else FORMATS[name]
        except UnknownName as error:
            raise DataError(f"{path}: {error}") from error
        for target, rule in target_problems(columns or {}, name):
            raise DataError(f"{path}: data.columns.{target}: {rule}")

    def pairs(self, rows: Iterable[tuple[int, dict[str, Any]]], bad: BadLines) -> Iterator[tuple[int, list[Pair]]]:
        """Yield the place and the pairs of every usable record of `rows`; `bad` collects the other records."""
        return ((line, pairs) for line, _, pairs in self.read(rows, bad))

    def read(
        self, rows: Iterable[tuple[int, dict[str, Any]]], bad: BadLines
    ) -> Iterator[tuple[int, dict[str, Any], list[Pair]]]:
        """For every usable record of `rows`, yield its place, the record with its fields renamed, and its pairs."""
        for line, row in rows:
            try:
                row = renamed(row, self.columns)
                read = self.settled or detect(row)
                if read not in (text, hh, implicit):
                    _refuse_earlier_turns(row, read)
                elif self.settled and self.name == AUTO:
                    _refuse_unread_prompt(row, read.__name__)
                if self.settled and self.name == AUTO:
                    refuse_second_prompt(row, [*read.fields, *EARLIER])
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
            yield line, row, pairs


def _refuse_unread_prompt(row: dict[str, Any], read_as: str) -> None:
    """Raise :class:`BadRecord` if the automatically chosen format ignores the prompt, or text or turns before it.

    A record is also refused if chosen and rejected only refer to the fields that contain the responses, or if both
    responses repeat the prompt.
    """
    refuse_labels(row)
    if read_as != "text":
        refuse_hidden_prompt(row, read_as)
        return
    refuse_repeated_prompt(row)
    for name in EARLIER:
        if isinstance(row.get(name), (str, list)) and not is_empty(row[name]):
            way = f"to leave out {name}, set format: text; to keep it, make prompt a list of messages"
            raise BadRecord(f"{name} is not read if there is a prompt; {way}")


def _refuse_earlier_turns(row: dict[str, Any], read: Format) -> None:
    """Raise :class:`BadRecord` if a format would leave out text or turns before the prompt."""
    for name in EARLIER:
        known = name in getattr(read, "fields", EARLIER)  # a format that declares no fields may read any field
        if not known and isinstance(row.get(name), (str, list)) and not is_empty(row[name]):
            raise BadRecord(f"{name} is not read by this format; set data.columns={{{name}: null}} to leave it out")


def _refuse_prompt(row: dict[str, Any]) -> None:
    if "prompt" in row:
        raise BadRecord(
            "unexpected field 'prompt': the format takes the prompt from chosen and rejected; use one format per source"
        )


def _last_hh_turn(name: str, dialogue: str) -> tuple[str, str]:
    """Split off the text of the last turn.

    Raises :class:`BadRecord` unless Human and Assistant turns alternate, the first turn is a Human turn, and the last
    turn is an Assistant turn.
    """
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
