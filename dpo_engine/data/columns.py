"""Rename the fields of a record by `data.columns`, and read all fields except the prompt and the responses.

A record is refused if a field with a known meaning cannot be read. Three kinds of fields are ignored: empty fields;
fields that do not change the record's meaning, such as a number of images; and fields without a known meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from dpo_engine.data.conversation import MEDIA, check_text
from dpo_engine.data.pair import FEW, FORMATS, NUMBERS, number
from dpo_engine.data.records import BadRecord
from dpo_engine.data.turn_masks import plain_name
from dpo_engine.strict_json import MORE_TEXT, BadJson, kind, parse_value
from dpo_engine.wording import nearest

SCORES = {"score_chosen": "chosen_reward", "score_rejected": "rejected_reward"}
"""Field names of the rewards in the UltraFeedback data sets, and the name that this package uses for each."""
OPTIONAL = ("weight", *NUMBERS, *SCORES, "system", "tools", "chat_template_kwargs")
"""Fields that every format either reads or refuses."""
ANSWERING = ("assistant", "gpt", "bot", "function_call", "tool_call", "tool", "observation")
"""Roles whose turns cannot begin a conversation, under each name that a format uses for them."""
EMPTY_JSON = ("", "[]", "{}", "null")
PART = r"(?:(?:prompt|chosen|rejected|response|completion)_)?"
MEANINGS = {
    "media": PART + MEDIA.pattern,
    "system": "system|system_(?:prompt|message|instruction)|sys_prompt|preamble",
    "mask": PART + r"(?:(?:loss|train|turn|label|token|assistant)_)?masks?|(?:turn|token)_weights|loss|weights",
    "train": r"train|training|trainable|train_on(?:_\w+)?",
    "weight": "(?:loss|sample|example|instance)_(?:weight|scale)s?",
    "tools": "tools|functions",
    "chat_template_kwargs": "chat_template_kwargs",
    "unread": r"(?:chosen|rejected)_(?:tools|functions|system|reasoning|reasoning_content|thinking|thoughts?|cot)|"
    r"(?:(?:assistant|response|answer|completion)_)?(?:prefix|prefill)|initial_reason_steps|documents",
    "tie": "(?:is_)?tie",
}
"""Regular expressions for the names of fields with a known meaning."""
CONTROLS = re.compile(
    r"messages|conversations?|tools|chat_template|tokenize|add_generation_prompt|continue_final_message|padding|"
    r"truncation|max_length|return_\w+|\w+_kwargs"
)
"""Arguments of transformers' `apply_chat_template` that are not variables of a template. Data must not set them."""


def target_problems(columns: Mapping[str, str | None], format_name: str) -> list[tuple[str, str]]:
    """Return the names in `data.columns` that the format does not read, each with an error message.

    For the format `auto`, these are the names that no format reads. A format that does not declare its fields allows
    any name.
    """
    formats = [FORMATS[format_name]] if format_name != "auto" else list(FORMATS.values())
    declared = [getattr(entry, "fields", None) for entry in formats]
    if format_name != "auto" and declared == [None]:
        return []
    known = sorted({name for names in declared for name in names or ()} | set(OPTIONAL))
    unknown = [name for name, column in columns.items() if column is not None and name not in known]
    way = "in data.columns, the key is the format's field name and the value is the field name in your records"
    rules = []
    for name in unknown:
        hint = f"; did you mean {near}?" if (near := nearest(name, known)) else ""
        rules.append((name, f"format {format_name} has no field {name!r}; {way}{hint}"))
    return rules


def renamed(row: dict[str, Any], columns: Mapping[str, str | None] | None) -> dict[str, Any]:
    """Return the record with its fields renamed by `data.columns`.

    columns  maps each new name to the field's name in the record. If it maps a name to None, the record's field with
             this name is left out

    Raises :class:`BadRecord` if a field is missing, or if the record already has another field with the new name.
    """
    if not columns:
        return row
    moved = {column for column in columns.values() if column is not None}
    for name, column in columns.items():
        if column is None:
            continue
        if column not in row:
            found = ", ".join(islice(row, FEW)) or "no fields"
            raise BadRecord(f"data.columns.{name}={column}: there is no field {column!r} (found {found})")
        if name in row and name not in moved:
            raise BadRecord(
                f"data.columns.{name}={column}: the record also has a field {name!r}; rename one of the two"
            )
    left = {name: value for name, value in row.items() if name not in moved and name not in columns}
    return left | {name: row[column] for name, column in columns.items() if column is not None}


def facts(row: dict[str, Any], *, conversation: bool) -> dict[str, Any]:
    """Return a record's weight, other numbers, tools and template options; null and empty fields are omitted.

    conversation  whether a chat template renders the record; a record of plain text cannot have tools, template options
                  or a system turn

    Raises :class:`BadRecord` if a field with a known meaning cannot be read, or if two fields contradict each other.
    """
    found = {name: row[name] for name in ("weight", *NUMBERS) if row.get(name) is not None}
    for score, reward in SCORES.items():
        value = row.get(score)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # NaN: no score
            if found.setdefault(reward, number(score, value)) != value:
                raise BadRecord(f"{score} and {reward} differ; keep one of them")
    for name, meaning in meanings(tuple(row)):
        value = row[name]
        if is_empty(value) or (meaning != "system" and isinstance(value, str) and value.strip() in EMPTY_JSON):
            continue
        drop = f"set data.columns={{{name}: null}} to leave out this field"
        if meaning == "media":
            if isinstance(value, (int, float)):
                continue  # for example a number of images, or a flag that says whether there are images
            raise BadRecord(f"{name}: only text is supported; {drop}")
        if meaning == "unread":
            if isinstance(value, (str, list, dict)):
                raise BadRecord(f"{name} is not read; {drop}")
            continue
        if meaning == "tie":
            if value is True or value == 1:
                raise BadRecord(f"{name} is true, so neither response is better; remove the record, or {drop}")
            continue
        if meaning == "weight" and isinstance(value, (int, float)):
            if value != 1:
                raise BadRecord(
                    f"{name} is not read; set data.columns={{weight: {name}}}, or {{{name}: null}} to leave it out"
                )
        elif meaning == "train" and value is False:
            raise BadRecord(f"{name} is false, but the engine does not read this field; remove the record, or {drop}")
        elif meaning in ("mask", "train", "weight"):
            if isinstance(value, (list, dict)):
                raise BadRecord(f"{name} is not read; set weight 0 on the turns that must not be scored, or {drop}")
        elif name != meaning:
            raise BadRecord(
                f"{name} is not read; set data.columns={{{meaning}: {name}}}, or {{{name}: null}} to leave it out"
            )
        elif not conversation:
            way = (
                f"set format: messages, or data.columns={{{name}: null}} to leave out this field"
                if meaning == "system"
                else drop
            )
            raise BadRecord(f"{name} needs a conversation; {way}")
        elif meaning == "tools":
            found["tools"] = _tools(value)
        elif meaning == "chat_template_kwargs":
            found["template_options"] = _template_options(value)
    return found


def with_system(row: dict[str, Any], prompt: Any, *responses: Any) -> tuple[Any, ...]:
    """Return the prompt and the responses. A `system` text of the record becomes the first turn of each conversation.

    Raises :class:`BadRecord` if `system` is not text, or if a conversation begins with a different system or developer
    turn.
    """
    if is_empty(row.get("system")):
        return prompt, *responses
    turn = {"role": "system", "content": check_text("system", row["system"])}
    if isinstance(prompt, str) and not any(map(opens, responses)):
        return [turn, {"role": "user", "content": check_text("prompt", prompt)}], *responses
    return tuple(_begun(turn, part) if opens(part) else part for part in (prompt, *responses))


def opens(part: Any) -> bool:
    """Return whether a prompt or a response is a list of messages that includes the start of the conversation."""
    first = part[0] if isinstance(part, (list, tuple)) and part else None
    return isinstance(first, dict) and (first.get("role") or first.get("from")) not in (None, *ANSWERING)


def is_empty(value: Any) -> bool:
    """Return whether a value is empty: null, an empty text, list or object, or a list or object of empty values.

    In a table, a record that lacks a field has an empty value in the field's column.
    """
    if isinstance(value, dict):
        return all(is_empty(part) for part in value.values())
    return (
        value is None
        or value in ("", b"")
        or (isinstance(value, (list, tuple)) and all(is_empty(part) for part in value))
    )


def without_nulls(value: Any) -> Any:
    """Return a JSON value without the null fields of its objects, but keep null values of `default` and `const`."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if part is not None or key in ("default", "const")}
        return {key: without_nulls(part) for key, part in kept.items()}
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value


def from_json(name: str, value: Any) -> Any:
    """Parse a text as JSON, and return None for blank text. A value that is not text is returned unchanged.

    Raises :class:`BadRecord` if a text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_value(value.encode("utf-8", "surrogatepass"))
    except BadJson as error:
        what = "there is more than one value" if MORE_TEXT in str(error) else error
        raise BadRecord(f"{name} is text, but not JSON: {what}") from error


@lru_cache(maxsize=256)
def meanings(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the fields with a known meaning, each with its meaning. Letter case and separators are ignored."""
    plain = {name: plain_name(name) for name in names}
    return tuple(
        (name, meaning) for name, key in plain.items() for meaning, form in MEANINGS.items() if re.fullmatch(form, key)
    )


def _tools(value: Any) -> Sequence[Mapping[str, Any]]:
    given = from_json("tools", value)
    if isinstance(given, (list, tuple)):
        given = [from_json(f"tools[{place}]", tool) for place, tool in enumerate(given)]
    if not isinstance(given, (list, tuple)) or not all(isinstance(tool, dict) for tool in given):
        raise BadRecord(f"tools must be a list of JSON schemas, not {_shape(given)}")
    return tuple(without_nulls(tool) for tool in given)


def _template_options(value: Any) -> Mapping[str, Any]:
    given = from_json("chat_template_kwargs", value)
    if not isinstance(given, dict):
        raise BadRecord(f"chat_template_kwargs must be an object, not {kind(given)}")
    for name in given:
        if CONTROLS.fullmatch(name):
            raise BadRecord(f"chat_template_kwargs.{name}: data cannot set this argument of apply_chat_template")
    return {name: part for name, part in given.items() if part is not None}


def _begun(turn: dict[str, str], conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = conversation[0]
    if (role := first.get("role")) not in ("system", "developer"):
        return [turn, *conversation]
    if first.get("content") != turn["content"]:
        raise BadRecord(f"system and the conversation's own {role} turn differ; keep one of them")
    return list(conversation)


def _shape(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list with {kind(next(part for part in value if not isinstance(part, dict)))}"
    return kind(value)
