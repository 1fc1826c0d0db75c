"""Messages in the words of other systems, converted to messages with `role`, `content` and `tool_calls`."""

from __future__ import annotations

from typing import Any

from dpo_engine.data.columns import from_json, is_empty
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
"""Names that other systems give to the roles of turns."""
CALLS = ("function_call", "tool_call")
"""Roles of turns that hold the assistant's tool calls as JSON text."""


def role_of(turn: dict[str, Any]) -> Any:
    """Return the role of a message as the record names it."""
    return turn.get("role") or turn.get("from")


def turns_of(name: str, value: Any, first: int = 0) -> Turns:
    """Return messages with `role` and `content`, from messages in the words of any system.

    Tool calls in turns of their own become `tool_calls` of the assistant's turn; calls in a row join one turn.

    first  number of the first message, for errors

    Raises :class:`BadRecord` for an item that is no message.
    """
    turns: Turns = []
    for place, item in enumerate([value] if isinstance(value, dict) else value, first):
        here = f"{name}[{place}]"
        if not isinstance(item, dict):
            raise BadRecord(f"{here} must be a message, not {kind(item)}")
        if not is_empty(item.get("loss_scale")):
            raise BadRecord(f"{here}.loss_scale is not read; give a turn that is not to be scored weight 0")
        turn = {key: part for key, part in item.items() if key not in ("from", "value", "loss_scale")}
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
    """Add the tool calls of a turn to the assistant's turn before it, or as an assistant's turn."""
    given = from_json(here, turn.get("content"))
    calls = []
    for call in given if isinstance(given, list) else [given]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadRecord(f"{here} must be the JSON of a tool call with name and arguments")
        arguments = from_json(f"{here}.arguments", call.get("arguments", {}))
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    others = {key: part for key, part in turn.items() if key not in ("role", "content")}
    if turns and turns[-1].get("role") == "assistant":
        before = turns[-1]
        for key, part in others.items():
            if part is not None and part != before.get(key):
                raise BadRecord(f"{here}.{key} differs from that of the turn before it, which it belongs to")
        turns[-1] = {**before, "tool_calls": [*(before.get("tool_calls") or ()), *calls]}
    else:
        turns.append({"role": "assistant", "content": "", **others, "tool_calls": calls})
