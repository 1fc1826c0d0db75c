"""Message lists: what is a conversation, and which part of several conversations is their common prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_engine.data.records import BadRecord
from dpo_engine.strict_json import kind

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
UNRENDERED = ("tool_calls", "function_call", "reasoning_content", "thinking")


def check_text(name: str, value: Any) -> str:
    """The text itself. Raises :class:`BadRecord` for what is null, no text, empty, blank, or not whole Unicode."""
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {kind(value)}, not text")
    if not value.strip():
        raise BadRecord(f"{name} is only blanks" if value else f"{name} is empty")
    if "\0" in value:
        raise BadRecord(f"{name} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def one_prompt(prompt: Any, responses: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """The turns before the response, and the text of each response.

    prompt     messages up to a user's turn; or the text of that turn; or None: it is in the responses
    responses  by the name that errors use: messages, the response alone or the whole conversation; or its text

    Raises :class:`BadRecord` unless all conversations end with an assistant's turn, have a user's turn before it,
    alternate, and are equal up to that last turn. Turns are compared, never cut to fit.
    """
    lead: list[Message] = []
    asked = None
    if isinstance(prompt, str):
        asked = check_text("prompt", prompt)
    elif prompt is not None:
        lead = _turns("prompt", prompt)
        if lead[-1]["role"] != "user":
            raise BadRecord(f"prompt ends with a turn of the {lead[-1]['role']}; its last turn must be the user's")
    names = list(responses)
    whole = [_whole(name, value, lead, asked) for name, value in responses.items()]
    (*turns, _) = whole[0]
    for name, (*others, _) in zip(names[1:], whole[1:], strict=True):
        if turns != others:
            same = [a == b for a, b in zip(turns, others, strict=False)]
            turn = (same.index(False) if False in same else len(same)) + 1
            raise BadRecord(f"{names[0]} and {name} have different prompts: they differ at turn {turn}")
    return tuple(turns), [conversation[-1]["content"] for conversation in whole]


def _whole(name: str, value: Any, lead: list[Message], asked: str | None) -> list[Message]:
    """The conversation from its first turn to the response's."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    turns = _turns(name, value)
    if turns[0]["role"] == "assistant":
        if asked is not None:
            lead = [{"role": "user", "content": asked}]
        turns = lead + turns
    elif lead and turns[: len(lead)] != lead:
        raise BadRecord(f"{name} is another conversation than prompt")
    elif asked is not None and not any(turn == {"role": "user", "content": asked} for turn in turns):
        raise BadRecord(f"prompt is text and no user turn of {name} is equal to it")
    _check_order(name, turns)
    return turns


def _turns(name: str, value: Any) -> list[Message]:
    """Role and content of each message. Raises :class:`BadRecord` for anything else that would have to be rendered."""
    if not isinstance(value, (list, tuple)):
        raise BadRecord(f"{name} is {kind(value)}, not a list of messages")
    if not value:
        raise BadRecord(f"{name} is an empty list")
    turns = []
    for place, message in enumerate(value):
        here = f"{name}[{place}]"
        if not isinstance(message, dict):
            raise BadRecord(f"{here} is {kind(message)}, not a message with role and content")
        for key in ("role", "content"):
            if key not in message:
                raise BadRecord(f"{here} has no {key}; it has {', '.join(list(message)[:8]) or 'no fields'}")
        if message["role"] not in ROLES:
            raise BadRecord(f"{here} has the unknown role {message['role']!r}; use {', '.join(ROLES)}")
        for key in UNRENDERED:
            if message.get(key):
                raise BadRecord(f"{here}.{key} is not supported")
        turns.append({"role": message["role"], "content": check_text(f"{here}.content", message["content"])})
    return turns


def _check_order(name: str, turns: Sequence[Message]) -> None:
    """Raises :class:`BadRecord` unless user and assistant take turns, user first, after at most one system turn."""
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise BadRecord(f"{name} has a system turn that is not the first turn")
    if "user" not in roles:
        raise BadRecord(f"{name} has no user turn, so there is no prompt")
    if roles[-1] != "assistant":
        raise BadRecord(f"{name} must end with an assistant turn and ends with one of the {roles[-1]}")
    spoken = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(spoken):
        if role != ("user", "assistant")[place % 2]:
            before = f"after one of the {spoken[place - 1]}" if place else "at the start"
            raise BadRecord(f"{name} does not alternate: a turn of the {role} {before}")
