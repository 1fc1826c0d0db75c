"""Convert messages in other systems' formats to messages with `role`, `content` and `tool_calls`."""

from __future__ import annotations

from typing import Any

from dpo_engine.data.columns import from_json
from dpo_engine.data.records import BadRecord
from dpo_engine.strict_json import kind

Turns = list[dict[str, Any]]
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "observations": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names that other systems use for the roles of turns, with the standard role for each."""
CALLS = ("function_call", "tool_call")
"""Roles of turns that hold the assistant's tool calls as JSON text."""


def role_of(turn: dict[str, Any]) -> Any:
    """Return the role of a message as it is written in the record."""
    return turn.get("role") or turn.get("from")


def turns_of(name: str, value: Any, first: int = 0) -> Turns:
    """Convert messages in any supported system's format to messages with `role` and `content`.

    The calls in a turn of tool calls become `tool_calls` of the assistant turn directly before it. If there is no such
    turn, they become `tool_calls` of a new assistant turn. Consecutive turns of tool calls therefore become one turn.

    first  index of the first item of `value`, for errors

    Raises :class:`BadRecord` for an item that is not a message, and for a turn of tool calls that cannot be read or
    merged.
    """
    turns: Turns = []
    for place, item in enumerate([value] if isinstance(value, dict) else value, first):
        here = f"{name}[{place}]"
        if not isinstance(item, dict):
            raise BadRecord(f"{here} must be a message, not {kind(item)}")
        turn = {key: part for key, part in item.items() if key not in ("from", "value")}
        for key, other in (("role", "from"), ("content", "value")):
            if turn.get(key) is None and other in item:
                turn[key] = item[other]
        if isinstance(role := turn.get("role"), str):
            turn["role"] = ROLES.get(role, role)
        if role in CALLS:
            _add_calls(turns, here, turn)
        else:
            turns.append(turn)
    return turns


def _add_calls(turns: Turns, here: str, turn: dict[str, Any]) -> None:
    """Add a turn's tool calls to the assistant turn directly before it, or append a new assistant turn."""
    given = from_json(here, turn.get("content"))
    calls = []
    for call in given if isinstance(given, list) else [given]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadRecord(f"{here} must be a tool call as JSON, with a name and optional arguments")
        arguments = from_json(f"{here}.arguments", call.get("arguments", {}))
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    others = {key: part for key, part in turn.items() if key not in ("role", "content")}
    if turns and turns[-1].get("role") == "assistant":
        before = turns[-1]
        for key, part in others.items():
            if part is not None and part != before.get(key):
                raise BadRecord(
                    f"{here}.{key} differs from the value in the preceding assistant turn, to which this call belongs"
                )
        turns[-1] = {**before, "tool_calls": [*(before.get("tool_calls") or ()), *calls]}
    else:
        turns.append({"role": "assistant", "content": "", **others, "tool_calls": calls})
