"""Check lists of messages, and split conversations into their common prompt and the responses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dpo_engine.data.records import BadRecord
from dpo_engine.data.turn_masks import is_mask, plain_name, turn_weight
from dpo_engine.strict_json import kind

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
USUAL = frozenset(["role", "content"])
OPENING = ("system", "developer")
REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = re.compile(
    r"(?:attachment|image|img|picture|photo|video|audio)s?(?:_(?:path|url|uri|file|byte|data|base64)s?)?"
)
"""Names of fields with images, videos, audio and attached files."""


def check_text(name: str, value: Any) -> str:
    """Return `value`. Raises :class:`BadRecord` if it is not text, is empty or only whitespace, or contains a NUL
    character or invalid Unicode."""
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


def split_conversations(
    prompt: Any, responses: Mapping[str, Any]
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Return the turns of the prompt, and the turns of each response.

    prompt     messages that end with a user or tool turn; or the text of a user turn; or None if the responses contain
               the prompt
    responses  mapping whose keys are the names of the responses, for errors. Each value is the text of a response, its
               messages, or the messages of the whole conversation

    The prompt ends before the first turn that differs between the conversations, and never includes the last assistant
    turn of a conversation. Turns differ if any field except the weight differs. Turns are compared as a whole: a common
    start of two different turns is not part of the prompt.

    Raises :class:`BadRecord` for malformed messages; for turns in an invalid order; for conversations without a
    common prompt; and for a response in which no assistant turn is scored.
    """
    lead: list[Message] = []
    asked = None
    if isinstance(prompt, str):
        asked = check_text("prompt", prompt)
    elif prompt is not None:
        lead = _turns("prompt", prompt)
        if lead[-1]["role"] not in ("user", "tool"):
            raise BadRecord(f"the last turn of prompt must be from the user or a tool, not the {lead[-1]['role']}")
    names = list(responses)
    whole = [_whole(name, value, lead, asked) for name, value in responses.items()]
    end = _common_turns(names, whole)
    for name, turns in zip(names, whole, strict=True):
        if not any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in turns[end:]):
            raise BadRecord(
                f"{name} has no assistant turn that is scored: all assistant turns after the prompt have weight 0"
            )
    lead = [next((turn for turn in same if "weight" in turn), same[0]) for same in zip(*whole, strict=False)]
    return tuple(lead[:end]), [tuple(turns[end:]) for turns in whole]


def _common_turns(names: Sequence[str], whole: Sequence[Sequence[Message]]) -> int:
    """Return the number of turns of the common prompt."""
    last = min(max(i for i, turn in enumerate(turns) if turn["role"] == "assistant") for turns in whole)
    end = 0
    while end < last and all(_same(turns[end], whole[0][end]) for turns in whole):
        end += 1
    if not any(turn["role"] == "user" for turn in whole[0][:end]):
        other = next((n for n, turns in zip(names, whole, strict=True) if turns[end] != whole[0][end]), names[-1])
        raise BadRecord(f"{names[0]} and {other} have different prompts (first difference at turn {end + 1})")
    return end


def plain(turn: Message) -> Message:
    """Return a turn without its weight, which affects only the loss, not the text."""
    return {key: value for key, value in turn.items() if key != "weight"}


def _same(first: Message, second: Message) -> bool:
    return first == second or plain(first) == plain(second)


def _whole(name: str, value: Any, lead: list[Message], asked: str | None) -> list[Message]:
    """Return the conversation from its first turn to the end of the response."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    turns = _turns(name, value)
    if turns[0]["role"] == "assistant":
        if asked is not None:
            lead = [{"role": "user", "content": asked}]
        turns = lead + turns
    elif len(turns) < len(lead) or not all(map(_same, turns, lead)):
        raise BadRecord(f"{name} does not start with the turns of prompt")
    elif asked is not None and not any(turn["role"] == "user" and turn["content"] == asked for turn in turns):
        way = "if both responses contain the prompt, set data.columns={prompt: null}"
        raise BadRecord(f"no user turn of {name} is equal to the text of prompt; {way}")
    _check_order(name, turns)
    return turns


def _turns(name: str, value: Any) -> list[Message]:
    """Return the messages with their content as text, and without null fields, empty lists and empty reasoning.

    A field that excludes an assistant turn from the loss becomes `weight` 0; all other masks and weights are removed.

    Raises :class:`BadRecord` for malformed messages, for content other than text, and for masks that cannot be used.
    """
    if not isinstance(value, (list, tuple)):
        raise BadRecord(f"{name} must be a list of messages, not {kind(value)}")
    if not value:
        raise BadRecord(f"{name} is an empty list")
    return [_turn(f"{name}[{place}]", message) for place, message in enumerate(value)]


def _turn(here: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise BadRecord(f"{here} must be a message with role and content, not {kind(message)}")
    # In tables of messages, for example in Parquet files, the fields that a message lacks are null. They are removed.
    given = {key: value for key, value in message.items() if value is not None and value != []}
    given = {key: value for key, value in given.items() if value != "" or key not in REASONING}
    for key in ("role",) if given.get("tool_calls") else ("role", "content"):
        if key not in message:
            found = ", ".join(list(message)[:8]) or "no fields"
            raise BadRecord(f"{here} has no {key} (found {found}); a message needs role and content")
    role = given.get("role")
    if role not in ROLES:
        raise BadRecord(f"{here} has the unknown role {role!r}; use one of {', '.join(ROLES)}")
    more = not given.keys() <= USUAL
    for key in _unread(tuple(given)) if more else ():
        # A field with a number, such as a number of images, is accepted.
        if given[key] and (key == "function_call" or not isinstance(given[key], (int, float))):
            raise BadRecord(f"{here}.{key} is not supported")
    turn: Message = {"role": role}
    spoken = [key for key in REASONING if key in given] + (["tool_calls"] if "tool_calls" in given else [])
    if spoken and role != "assistant":
        raise BadRecord(f"{here}.{spoken[0]}: only an assistant turn can have this field, not a {role} turn")
    content = _content(here, given.get("content", message.get("content")))
    if spoken and (content is None or not content.strip()) or role == "tool" and content == "":
        turn["content"] = ""  # the turn consists of tool calls or reasoning, or the tool has returned nothing
    else:
        turn["content"] = check_text(f"{here}.content", content)
    for key in REASONING:
        if key in given:
            turn[key] = check_text(f"{here}.{key}", given[key])
    if "tool_calls" in given and not all(isinstance(call, dict) for call in _list(here, "tool_calls", given)):
        raise BadRecord(f"{here}.tool_calls must be a list of objects")
    if more:
        turn |= {key: value for key, value in given.items() if key not in turn and not is_mask(key)}
        if turn_weight(here, given) == 0 and role == "assistant":  # other turns are never scored
            turn["weight"] = 0
    return turn


@lru_cache(maxsize=256)
def _unread(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the fields of a message that have a known meaning, but are not supported."""
    return tuple(name for name in names if name == "function_call" or MEDIA.fullmatch(plain_name(name)))


def _list(here: str, key: str, message: Mapping[str, Any]) -> Sequence[Any]:
    if not isinstance(message[key], (list, tuple)):
        raise BadRecord(f"{here}.{key} must be a list, not {kind(message[key])}")
    return message[key]


def _content(here: str, content: Any) -> Any:
    """Return the content; join a list of text parts.

    Raises :class:`BadRecord` for a part that is not text, for a text part without text, or for a part that is excluded
    from the loss.
    """
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if part["type"] != "text":
            raise BadRecord(
                f"{here}.content has a part of type {str(part['type'])[:20]!r}; only text parts can be read"
            )
        if not isinstance(part.get("text"), str):
            raise BadRecord(f"{here}.content has a part of type 'text' without text")
        if turn_weight(f"{here}.content", part) == 0:
            raise BadRecord(f"{here}.content has a part that is not scored; only whole turns can have weight 0")
    return "".join(part["text"] for part in content)


def _check_order(name: str, turns: Sequence[Message]) -> None:
    """Check the order of turns: at most one system or developer turn, at the start; then user and assistant alternate.

    Tool turns are allowed between two assistant turns. The last turn must be an assistant turn.

    Raises :class:`BadRecord` if the order is wrong.
    """
    roles = [turn["role"] for turn in turns]
    for role in OPENING:
        if role in roles[1:]:
            raise BadRecord(f"{name} has a {role} turn after the first turn; only the first turn may be a {role} turn")
    if "user" not in roles:
        raise BadRecord(f"{name} has no user turn, so there is no prompt")
    if roles[-1] != "assistant":
        raise BadRecord(f"{name} must end with an assistant turn, not a {roles[-1]} turn")
    spoken = roles[1:] if roles[0] in OPENING else roles
    for role, before in zip(spoken, [None, *spoken], strict=False):
        allowed = {
            None: ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool"),
        }
        if role not in allowed[before]:
            place = f"after {before}" if before else "at the start"
            raise BadRecord(
                f"{name} must alternate between user and assistant, starting with user; found {role} {place}"
            )
