"""Message lists: check them, and split conversations into their common prompt and their final responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_engine.data.records import BadRecord
from dpo_engine.strict_json import kind

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
UNRENDERED = ("tool_calls", "function_call", "reasoning_content", "thinking")


def check_text(name: str, value: Any) -> str:
    """Return the text. Raises :class:`BadRecord` if it is null, not text, empty, only whitespace or invalid Unicode."""
    if not isinstance(value, str):
        raise BadRecord(f"{name} must be text, not {kind(value)}")
    if not value.strip():
        raise BadRecord(f"{name} contains only whitespace" if value else f"{name} is empty")
    if "\0" in value:
        raise BadRecord(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"{name} contains an unpaired surrogate at character {error.start + 1}") from error
    return value


def one_prompt(prompt: Any, responses: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """Return the turns before the response, and the text of each response.

    prompt     messages that end with a user turn; or the text of that user turn; or None if the responses contain it
    responses  keyed by the name to use in errors; each is the text of a response, its messages, or the messages of the
               whole conversation

    Raises :class:`BadRecord` unless every conversation ends with an assistant turn, has a user turn before it,
    alternates between the two, and has the same turns before the last one as the others. Turns are compared as they
    are, never truncated to match.
    """
    lead: list[Message] = []
    asked = None
    if isinstance(prompt, str):
        asked = check_text("prompt", prompt)
    elif prompt is not None:
        lead = _turns("prompt", prompt)
        if lead[-1]["role"] != "user":
            raise BadRecord(f"the last turn of prompt must be from the user, not the {lead[-1]['role']}")
    names = list(responses)
    whole = [_whole(name, value, lead, asked) for name, value in responses.items()]
    (*turns, _) = whole[0]
    for name, (*others, _) in zip(names[1:], whole[1:], strict=True):
        if turns != others:
            same = [a == b for a, b in zip(turns, others, strict=False)]
            turn = (same.index(False) if False in same else len(same)) + 1
            raise BadRecord(f"{names[0]} and {name} have different prompts (first difference at turn {turn})")
    return tuple(turns), [conversation[-1]["content"] for conversation in whole]


def _whole(name: str, value: Any, lead: list[Message], asked: str | None) -> list[Message]:
    """Return the conversation from its first turn to the response."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    turns = _turns(name, value)
    if turns[0]["role"] == "assistant":
        if asked is not None:
            lead = [{"role": "user", "content": asked}]
        turns = lead + turns
    elif lead and turns[: len(lead)] != lead:
        raise BadRecord(f"{name} does not start with the turns of prompt")
    elif asked is not None and not any(turn == {"role": "user", "content": asked} for turn in turns):
        raise BadRecord(f"no user turn of {name} is equal to the text of prompt")
    _check_order(name, turns)
    return turns


def _turns(name: str, value: Any) -> list[Message]:
    """Return the role and content of each message.

    Raises :class:`BadRecord` for malformed messages, and for other content that would have to be rendered.
    """
    if not isinstance(value, (list, tuple)):
        raise BadRecord(f"{name} must be a list of messages, not {kind(value)}")
    if not value:
        raise BadRecord(f"{name} is an empty list")
    turns = []
    for place, message in enumerate(value):
        here = f"{name}[{place}]"
        if not isinstance(message, dict):
            raise BadRecord(f"{here} must be a message with role and content, not {kind(message)}")
        for key in ("role", "content"):
            if key not in message:
                found = ", ".join(list(message)[:8]) or "no fields"
                raise BadRecord(f"{here} has no {key} (found {found}); a message needs role and content")
        if message["role"] not in ROLES:
            raise BadRecord(f"{here} has the unknown role {message['role']!r}; use one of {', '.join(ROLES)}")
        for key in UNRENDERED:
            if message.get(key):
                raise BadRecord(f"{here}.{key} is not supported")
        turns.append({"role": message["role"], "content": check_text(f"{here}.content", message["content"])})
    return turns


def _check_order(name: str, turns: Sequence[Message]) -> None:
    """Check the order of turns: at most one system turn, at the start, then user and assistant in turn.

    Raises :class:`BadRecord`.
    """
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise BadRecord(f"{name} has a system turn after the first turn; only the first turn may be from the system")
    if "user" not in roles:
        raise BadRecord(f"{name} has no user turn, so there is no prompt")
    if roles[-1] != "assistant":
        raise BadRecord(f"{name} must end with an assistant turn, not a {roles[-1]} turn")
    spoken = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(spoken):
        if role != ("user", "assistant")[place % 2]:
            before = f"after {spoken[place - 1]}" if place else "at the start"
            raise BadRecord(
                f"{name} must alternate between user and assistant, starting with user; found {role} {before}"
            )
