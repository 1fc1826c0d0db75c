"""Read the fields that a format requires, and explain which field of a record is missing or has the wrong type."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from dpo_engine.data.pair import FEW, FIELDS
from dpo_engine.data.records import BadRecord
from dpo_engine.errors import quoted
from dpo_engine.strict_json import kind

OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("preferred", "accepted", "winner", "positive", "better"),
    "rejected": ("dispreferred", "declined", "loser", "negative", "worse"),
}
WANTED = {str: "text", list: "a list", (list, dict): "a list of messages"}
JSON_TURNS = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|from|content|value)\1\s*:")


def required(row: Mapping[str, Any], names: Sequence[str], types: Any) -> list[Any]:
    """Return the values of the named fields.

    Raises :class:`BadRecord` if a value is missing, has the wrong type, or is a list of messages written as text.
    """
    for name in names:
        if name not in row:
            raise BadRecord(_missing(name, row))
        if not isinstance(row[name], types):
            wanted = WANTED.get(types, "text or a list of messages")
            raise BadRecord(f"{name} must be {wanted}, not {_described(row[name])}")
        if isinstance(row[name], str) and _is_json_turns(row[name]):
            raise BadRecord(f"{name} is a list of messages written as text; store it as a list, not as JSON text")
    return [row[name] for name in names]


def _missing(name: str, row: Mapping[str, Any]) -> str:
    others = [key for key in islice(row, FEW) if key not in FIELDS]
    near = [key for key in others if name in key.lower() or key.lower() in OTHER_NAMES.get(name, ())]
    near += difflib.get_close_matches(name, others, 1)
    if near:
        found = quoted(near[0])
        return f"missing field {name!r} (found {found}); set data.columns={{{name}: {near[0]}}}"
    return f"missing field {name!r} (found {', '.join(islice(row, FEW)) or 'no fields'})"


def _described(value: Any) -> str:
    """Describe the type of a value; for an object, also name its first fields."""
    return f"an object with {', '.join(islice(value, FEW))}" if isinstance(value, dict) and value else kind(value)


def _is_json_turns(text: str) -> bool:
    """Return whether a text is a list of messages in JSON, or begins like a list of messages in Python notation."""
    opening = JSON_TURNS.match(text)
    if opening is None:
        return False
    if opening[1] == "'":
        return True
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return False
    pairs = ({"role", "content"}, {"from", "value"}, {"from", "content"})
    return all(isinstance(turn, dict) and any(pair <= turn.keys() for pair in pairs) for turn in turns)
