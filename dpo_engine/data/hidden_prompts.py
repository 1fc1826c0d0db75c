"""Refuse records in which a field that is not read may be the prompt, a part of the prompt, or a response.

Without these checks, a record without a field `prompt` would be read as two responses whose common prefix is the
prompt. The first words that both responses share would become the prompt, and the actual prompt, which is in another
field, would be left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from dpo_engine.data.columns import is_empty, meanings
from dpo_engine.data.records import BadRecord
from dpo_engine.data.turn_masks import plain_name

RESPONSES = ("chosen", "rejected")
PROMPT = frozenset(
    "prompt prompts question questions query queries instruction instructions instruct input inputs context contexts "
    "problem problems request requests message messages conversation conversations dialog dialogs dialogue dialogues "
    "history turn turns utterance utterances ask inquiry human q".split()
)
"""Words in the names of prompts. A field with one of these words in its name counts as a prompt, whatever text, list or
object it contains. The exceptions are names whose last word is in `OTHER` or `VAGUE`, such as `prompt_id` and
`question_type`."""
TEXT = frozenset("text texts content document article passage paragraph sentence post email story title body".split())
"""Words in the names of fields with text, which may or may not be a prompt."""
VAGUE = frozenset("source sources src origin info note notes topic subject name task goal scenario".split())
"""Words in the names of fields that may be prompts or may describe the record."""
OTHER = frozenset(
    "id ids uid uuid guid dataset subset split meta metadata comment comments remark remarks reason reasons reasoning "
    "rationale explanation feedback critique review annotator annotators annotation annotations labeler rater worker "
    "judge judgment judgement evaluator evaluation label labels tag tags category categories type types kind class "
    "domain language lang locale model models generator version license url uri link path file filename author date "
    "time timestamp created updated score scores rating ratings rank preference margin reward rewards weight hash key "
    "index idx number num count length len tokens size quality difficulty level status flag flags safety safe "
    "criteria aspect aspects rubric principle principles chosen rejected system order step seed batch row column line "
    "config settings params usage cost latency answer answers response responses completion completions output "
    "outputs generation generations reference references solution solutions gold target targets expected format "
    "template hyperparameters stop finish extra extras other".split()
)
"""Words in the names of fields that are not prompts."""
OF_PROMPTS = frozenset("user chat previous past prior earlier".split())
"""Other words that occur in the names of prompts, as in `user_input` and `chat_history`."""
SOURCES = frozenset("document passage article post background knowledge".split())
"""Names of fields that may contain a text to which the prompt refers. A record is refused if such a field is not read
and no field that is read contains its text."""
MOST_LABEL = 40
DEPTH = 3
ITEMS = 4
WORDS = 3
LETTERS = 8
QUESTION = ("?", "？", "؟")
"""Characters at the end of a question."""


def refuse_hidden_prompt(row: Mapping[str, Any], read_as: str) -> None:
    """Raise :class:`BadRecord` if a field other than chosen and rejected may be the prompt.

    read_as  the format that would read the record and ignore this field
    """
    if (name := hidden_prompt(row)) is None:
        return
    several = prompt_fields(row)
    # Prefer fields whose names have only words of `PROMPT` and `OF_PROMPTS`, such as `input`. Use fields
    # whose names also have other words, such as `labeling_prompt`, only if there is no field of the first kind.
    several = [field for field in several if _is_whole(field)] or several
    if len(several) == 1:
        name = several[0]
    elif several:
        shown = " and ".join(map(repr, several[:ITEMS]))
        raise BadRecord(f"{shown} may be the prompt; join them as 'prompt', or set format: {read_as} if they are not")
    above, _, last = name.rpartition(".")
    way, shown = f"set data.columns={{prompt: {name}}}, or", repr(name)
    if name not in row:
        way, shown = "make it the field 'prompt', or set", f"{last!r} in {above!r}"
    raise BadRecord(f"{shown} may be the prompt; {way} format: {read_as} if it is not")


def hidden_prompt(row: Mapping[str, Any]) -> str | None:
    """Return the dotted name of a field that may be the prompt, or None.

    A field may be the prompt in four cases. First, it has the name of a prompt (see `PROMPT`). Second, its name ends
    with a word of `TEXT` or has only unknown words, and the field contains a sentence or a question. Third, its name is
    vague (it has a word of `VAGUE`, and :func:`_kind` returns "vague"), and the field contains a sentence that is
    longer than the common prefix of chosen and rejected. Fourth, it is inside another field, and has the name of a
    prompt. A field that is inside another field and has any other name is accepted.
    """
    if found := prompt_fields(row):
        return found[0]
    fields = [(name, kind, row[name]) for name, kind in _kinds(tuple(row))]
    for name, kind, value in fields:
        if not isinstance(value, str):
            continue
        if kind in ("text", "unknown") and (_is_sentence(value) or value.rstrip().endswith(QUESTION)):
            return name
        if kind == "vague" and _is_sentence(value) and len(value) > _common_length(row):
            return name
    return next((found for name, _, value in fields for found in _inside(name, value, DEPTH)), None)


def prompt_fields(row: Mapping[str, Any]) -> list[str]:
    """Return the fields that have the name of a prompt and contain a nonempty text, list or object."""
    named = [name for name, kind in _kinds(tuple(row)) if kind == "prompt"]
    return [name for name in named if isinstance(row[name], (str, list, dict)) and not is_empty(row[name])]


def refuse_second_prompt(row: Mapping[str, Any], read: Collection[str]) -> None:
    """Raise :class:`BadRecord` if a field that is not read may belong to the prompt and has text of its own.

    read  names of the fields that the format reads

    Two kinds of names are considered: those in `SOURCES`, and those that have only words of `PROMPT` and `OF_PROMPTS`,
    such as `input` and `userQuery`, but not `judge_prompt`. A field is accepted if the fields that are read contain its
    text or, if it is a conversation, the text of its user and system turns.
    """
    for name in _more_prompts(tuple(row)):
        if name in read or not isinstance(row[name], (str, list, dict)) or is_empty(row[name]):
            continue
        known_texts = [text for field in read if field in row for text in _texts(row[field])]
        left = [text for text in _texts(row[name], asked=True) if not any(text in known for known in known_texts)]
        found = "\0".join(map(_plain, known_texts)) if left else ""
        if any(_plain(text) not in found for text in left):
            known = next(field for field in read if field in row)
            way = f"join the two fields, or set data.columns={{{name}: null}}"
            raise BadRecord(f"{name!r} is not read, but {known} is; {way}")


@lru_cache(maxsize=256)
def _more_prompts(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        name for name, kind in _kinds(names) if (kind == "prompt" and _is_whole(name)) or plain_name(name) in SOURCES
    )


def _plain(text: str) -> str:
    return " ".join(text.split())


def _texts(value: Any, *, asked: bool = False, depth: int = DEPTH) -> Iterator[str]:
    """Yield the texts in a value.

    asked  whether to skip fields that are not prompts, and turns of all roles except user, human and system
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)) and depth:
        for part in value:
            yield from _texts(part, asked=asked, depth=depth - 1)
    elif isinstance(value, dict) and depth:
        role = value.get("role") or value.get("from")
        if asked and role is not None and role not in ("user", "human", "system"):
            return
        for name, part in value.items():
            if not asked or (name in ("content", "value", "text") if role is not None else _kind(name) == "prompt"):
                yield from _texts(part, asked=asked, depth=depth - 1)


@lru_cache(maxsize=256)
def _kinds(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the fields, each with the kind that its name suggests. Fields with a known meaning are left out."""
    known = {"prompt", *RESPONSES, *dict(meanings(names))}
    return tuple((name, _kind(name)) for name in names if name not in known)


def _inside(above: str, value: Any, depth: int) -> Iterator[str]:
    """Yield the dotted name of each field that is inside a value and has the name of a prompt."""
    if isinstance(value, (list, tuple)) and depth:
        for part in islice(value, ITEMS):
            yield from _inside(above, part, depth - 1)
    elif isinstance(value, dict) and depth:
        for name, part in value.items():
            if isinstance(part, (str, list, dict)) and not is_empty(part) and _kind(name) == "prompt":
                yield f"{above}.{name}"
            yield from _inside(f"{above}.{name}", part, depth - 1)


def _common_length(row: Mapping[str, Any]) -> int:
    """Return the number of characters that chosen and rejected have in common at the start; 0 unless both are text."""
    responses = [row.get(name) for name in RESPONSES]
    return len(os.path.commonprefix(responses)) if all(isinstance(part, str) for part in responses) else 0


@lru_cache(maxsize=1024)
def _kind(name: str) -> Literal["prompt", "text", "vague", "other", "unknown"]:
    """Return the kind of a field by the words of its name. `userInput` and `user_input` have the same words."""
    words = _words(name)
    last = words[-1] if words else ""
    if last in VAGUE and not PROMPT.intersection(words):
        return "vague"
    if last in OTHER or last in VAGUE:  # prompt_id, question_type, context_length
        return "other"
    if PROMPT.intersection(words):
        return "prompt"
    if last in TEXT:
        return "text"
    if OTHER.intersection(words):
        return "other"
    return "vague" if VAGUE.intersection(words) else "unknown"


def refuse_labels(row: Mapping[str, Any]) -> None:
    """Raise :class:`BadRecord` if chosen and rejected only refer to the fields that contain the responses.

    Examples: "response_a" for the field of this name, "B" for the field `answer_b`, "2" for the field `output_2`.
    """
    labels = [row[name].strip() if isinstance(row.get(name), str) else "" for name in RESPONSES]
    if not all(0 < len(label) <= MOST_LABEL for label in labels):
        return
    others = {plain_name(name): name for name in row if name not in RESPONSES}
    found = []
    for label in map(plain_name, labels):
        named = next((name for key, name in others.items() if key == label or key.endswith(f"_{label}")), None)
        found.append(named if named and isinstance(row[named], str) else None)
    if None not in found and found[0] != found[1]:
        raise BadRecord(
            f"chosen and rejected only refer to the fields {found[0]!r} and {found[1]!r}; write the responses instead"
        )


def _is_whole(name: str) -> bool:
    """Return whether a name has only words of `PROMPT` and `OF_PROMPTS`."""
    return (PROMPT | OF_PROMPTS).issuperset(_words(name))


def _words(name: str) -> list[str]:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return [word.lower() for word in re.split(r"[\W_\d]+", words) if word]


def _is_sentence(text: str) -> bool:
    """Return whether the first 400 characters of a text have at least `WORDS` words, or at least `LETTERS` letters
    from U+2E80 on, such as Chinese and Japanese, which have no spaces."""
    beginning = text[:400]
    return len(beginning.split()) >= WORDS or sum(letter > "\u2e7f" for letter in beginning) >= LETTERS
