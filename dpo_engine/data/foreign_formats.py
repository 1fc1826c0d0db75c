"""Read the data formats of other systems as those systems do. The docstrings name the few differences.

The docstring of each format describes a record; ``docs/data.md`` shows an example of each format. The sources are the
data loaders of these systems, at the revisions named in ``tests/data/test_foreign_formats.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpo_engine.data.columns import facts, is_empty, opens, with_system
from dpo_engine.data.conversation import check_text
from dpo_engine.data.fields import required
from dpo_engine.data.foreign_turns import Turns, role_of, turns_of
from dpo_engine.data.hidden_prompts import prompt_fields
from dpo_engine.data.pair import FORMATS, Pair, number
from dpo_engine.data.records import BadRecord

RESPONSES = ("chosen", "rejected")
PARTS = (str, list, dict)
SWIFT_ASKS = ("user", "human", "tool")
"""Roles of the turns that a rejected response can follow. As in Megatron-SWIFT, `tool_response` is not one of them."""


@FORMATS.register("colossalchat", fields=("context", *RESPONSES))
def colossalchat(row: dict[str, Any]) -> Pair:
    """ColossalChat: `context`, `chosen` and `rejected` as lists of {from, content}.

    If the first turn of `context` is a system turn, the conversation keeps this turn. A different `system` text of the
    record is then an error. Without a system turn in `context`, a `system` text becomes the system turn. If the record
    has neither, there is no system turn here; ColossalChat itself adds the default system turn of its template.
    """
    context, chosen, rejected = (
        turns_of(name, part) for name, part in _parts(row, ("context", *RESPONSES), (list, dict)).items()
    )
    return Pair(*with_system(row, context, chosen, rejected), **facts(row, conversation=True))


@FORMATS.register("nemo_aligner", fields=("prompt", "chosen_response", "rejected_response"))
def nemo_aligner(row: dict[str, Any]) -> Pair:
    """NeMo-Aligner: `prompt`, `chosen_response` and `rejected_response`, with optional rewards.

    If the prompt is text, it already contains the chat template's tokens, and each response is appended to the prompt
    unchanged. If the prompt is a list of messages, it is a conversation, and each response is one message.
    """
    prompt, chosen, rejected = _parts(row, ("prompt", "chosen_response", "rejected_response"), PARTS).values()
    if all(isinstance(part, str) for part in (prompt, chosen, rejected)):
        return Pair(prompt, chosen, rejected, **facts(row, conversation=False))
    if isinstance(prompt, str):
        raise BadRecord("prompt is text, but the responses are messages; make prompt a list of messages")
    parts = (turns_of("prompt", prompt), _response("chosen_response", chosen), _response("rejected_response", rejected))
    return Pair(*with_system(row, *parts), **facts(row, conversation=True))


@FORMATS.register("alpaca", fields=("instruction", "input", "history", *RESPONSES))
def alpaca(row: dict[str, Any]) -> Pair:
    """LLaMA-Factory, ROLL: `instruction` and the text of both responses; optional `input`, `system` and `history`.

    The user turn is the instruction and, on the next line, the input. `history` lists earlier pairs of user and
    assistant turns. ROLL's own pipeline leaves out the input.
    """
    chosen, rejected = required(row, RESPONSES, str)
    prompt = [*_history(row), {"role": "user", "content": _instruction(row)}]
    return _single(row, prompt, chosen, rejected)


@FORMATS.register("orca", fields=("question", *RESPONSES))
def orca(row: dict[str, Any]) -> Pair:
    """Intel/orca_dpo_pairs: `question` and the text of both responses, with an optional `system`.

    The prompt is one user turn, as in LLaMA-Factory and Megatron-SWIFT, which support this data set.
    """
    question, chosen, rejected = required(row, ("question", *RESPONSES), str)
    return _single(row, [{"role": "user", "content": check_text("question", question)}], chosen, rejected)


@FORMATS.register("sharegpt", fields=("conversations", "messages", *RESPONSES))
def sharegpt(row: dict[str, Any]) -> Pair:
    """LLaMA-Factory, EasyDeL: `conversations` of {from, value} as the prompt, and one such object for each response.

    A record may have `messages` of {role, content} instead of `conversations`. If it has neither field, `chosen` and
    `rejected` are whole conversations. `function_call` turns are tool calls, and `observation` turns are tool results.
    """
    chosen, rejected = (_response(name, part) for name, part in _parts(row, RESPONSES, PARTS).items())
    name = next((name for name in ("conversations", "messages") if not is_empty(row.get(name))), None)
    prompt = name and turns_of(name, required(row, (name,), list)[0])
    return Pair(*with_system(row, prompt, chosen, rejected), **_facts(row))


@FORMATS.register(
    "swift",
    fields=(
        *("messages", "conversations", "query", "instruction", "input", "history", "response", "output"),
        *("rejected_response", "rejected_messages"),
    ),
)
def swift(row: dict[str, Any]) -> Pair:
    """Megatron-SWIFT: `messages` that end with the chosen response, and `rejected_response` or `rejected_messages`.

    `rejected_response` is a text or a list of messages, and replaces everything after the last turn whose role is in
    `SWIFT_ASKS`. `rejected_messages` is a whole conversation. The list `messages` may also have the name
    `conversations`. Instead of this list, a record may have `query` and `response`, or `instruction`, `input` and
    `output`; `history` lists earlier pairs of turns. `tool_call` turns are tool calls, and `tool_response` turns are
    tool results.
    """
    name, messages = _swift_messages(row)
    for objects in ("objects", "rejected_objects"):
        if not is_empty(row.get(objects)):
            raise BadRecord(f"{objects}: only text is supported; set data.columns={{{objects}: null}} to leave it out")
    other_tools = row.get("rejected_tools")
    row = {name: value for name, value in row.items() if name != "rejected_tools"}
    if not is_empty(other_tools) and _facts({**row, "tools": other_tools}) != _facts(row):
        raise BadRecord("rejected_tools differ from tools; both responses must have the same tools")
    if not is_empty(row.get("rejected_messages")):
        rejected = turns_of("rejected_messages", required(row, ("rejected_messages",), list)[0])
        return Pair(*with_system(row, None, turns_of(name, messages), rejected), **_facts(row))
    rejected = _response("rejected_response", required(row, ("rejected_response",), PARTS)[0])
    asking = [place for place, turn in enumerate(messages) if isinstance(turn, dict) and role_of(turn) in SWIFT_ASKS]
    end = max(asking, default=-1) + 1
    if not 0 < end < len(messages):
        raise BadRecord(f"{name} must have a user turn, and the chosen response must follow the last user or tool turn")
    if not isinstance(rejected, str) and any(turn.get("role") == "user" for turn in rejected):
        raise BadRecord("rejected_response has a user turn; give the whole conversation as rejected_messages")
    prompt, chosen = turns_of(name, messages[:end]), turns_of(name, messages[end:], end)
    return Pair(*with_system(row, prompt, chosen, rejected), **_facts(row))


@FORMATS.register("nemo_rl", fields=("context", "completions"))
def nemo_rl(row: dict[str, Any]) -> Pair | None:
    """NeMo-RL: `context` as messages, and two `completions` of {rank, completion}.

    The completion with the smaller rank number is chosen. `context` may also be the text of a user turn. A
    record with equal ranks is left out here; in NeMo-RL, it ends the run.
    """
    context, completions = required(row, ("context",), (str, list))[0], required(row, ("completions",), list)[0]
    if len(completions) != 2:
        raise BadRecord(f"completions must have 2 items, not {len(completions)}; for more items, use the format ranked")
    ranks, responses = [], []
    for place, item in enumerate(completions):
        here = f"completions[{place}]"
        if not isinstance(item, dict) or not {"rank", "completion"} <= item.keys():
            raise BadRecord(f"{here} must be an object with rank and completion")
        ranks.append(number(f"{here}.rank", item["rank"]))
        responses.append(turns_of(f"{here}.completion", item["completion"]))
    if ranks[0] == ranks[1]:
        return None
    chosen, rejected = responses if ranks[0] < ranks[1] else reversed(responses)
    return Pair(*with_system(row, _context(context), chosen, rejected), **facts(row, conversation=True))


@FORMATS.register("helpsteer3", fields=("context", "response1", "response2", "overall_preference"))
def helpsteer3(row: dict[str, Any]) -> Pair | None:
    """HelpSteer3's preferences: `context`, `response1`, `response2`, and `overall_preference` from -3 to 3.

    `context` is a list of messages, or the text of a user turn. If the preference is negative, `response1` is chosen;
    if it is positive, `response2` is chosen. The absolute value of the preference is the margin. A record with
    preference 0 is left out here; NeMo-RL turns it into a pair of two equal responses.
    """
    first, second = required(row, ("response1", "response2"), str)
    context, given = required(row, ("context", "overall_preference"), object)
    preference = number("overall_preference", given)
    if preference == 0:
        return None
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    found = {"margin": abs(preference)} | facts(row, conversation=True)
    return Pair(*with_system(row, _context(context), chosen, rejected), **found)


def recognized(row: dict[str, Any]) -> str | None:
    """Return the name of the first format in `FORMS` whose test accepts the record, or None."""
    return next((name for name, fits in FORMS.items() if fits(row)), None)


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: all(name in row for name in names)


def _is_swift(row: dict[str, Any]) -> bool:
    begins = not is_empty(row.get("messages")) or not is_empty(row.get("conversations"))
    answered = ("query" in row and "response" in row) or ("instruction" in row and "output" in row)
    return (begins or answered) and ("rejected_response" in row or "rejected_messages" in row) and "chosen" not in row


def _is_sharegpt(row: dict[str, Any]) -> bool:
    if not _asks(row):
        return _is_from_value(row)
    turns = [row.get(name) for name in ("conversations", "messages")]
    return any(isinstance(part, list) and not is_empty(part) for part in turns)


def _is_from_value(row: dict[str, Any]) -> bool:
    """Return whether chosen and rejected are whole conversations of {from, value}."""
    parts = [row.get(name) for name in RESPONSES]
    return "prompt" not in row and all(opens(part) and "from" in part[0] and "value" in part[0] for part in parts)


def _asks(row: dict[str, Any]) -> bool:
    """Return whether the record has two responses that are not whole conversations, and no field `prompt`."""
    return "prompt" not in row and all(name in row and not opens(row[name]) for name in RESPONSES)


def _is_colossalchat(row: dict[str, Any]) -> bool:
    turns = row.get("context")
    return _asks(row) and isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _is_answered(name: str, *others: str) -> Callable[[dict[str, Any]], bool]:
    """Return a test for text records whose prompt is the field `name`, together with the fields `others`.

    A record fails the test if another field has the name of a prompt, or if both responses begin with the text of the
    field `name` or with `Human:`.
    """

    def fits(row: dict[str, Any]) -> bool:
        asked, responses = row.get(name), [row.get(part) for part in RESPONSES]
        if not _asks(row) or not isinstance(asked, str) or not all(isinstance(part, str) for part in responses):
            return False
        if not {name, *others}.issuperset(prompt_fields(row)):
            return False  # part of the prompt would be left out
        return not all(part.lstrip().startswith(("Human:", asked.strip() or "\0")) for part in responses)

    return fits


FORMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "nemo_rl": _has("context", "completions"),
    "helpsteer3": _has("context", "response1", "response2", "overall_preference"),
    "nemo_aligner": _has("prompt", "chosen_response", "rejected_response"),
    "swift": _is_swift,
    "colossalchat": _is_colossalchat,
    "sharegpt": _is_sharegpt,
    "alpaca": _is_answered("instruction", "input", "history"),
    "orca": _is_answered("question"),
}
"""For each format, a test of whether a record has the format's fields. The first format whose test succeeds is used."""


def _parts(row: dict[str, Any], names: Sequence[str], types: Any) -> dict[str, Any]:
    return dict(zip(names, required(row, names, types), strict=True))


def _single(row: dict[str, Any], prompt: Turns, chosen: str, rejected: str) -> Pair:
    return Pair(*with_system(row, prompt, chosen, rejected), **_facts(row))


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """Return the result of :func:`facts` for a record.

    A tool that has neither the field `type` nor the field `function` is wrapped: {type: function, function: TOOL}.
    """
    found = facts(row, conversation=True)
    if "tools" in found:
        found["tools"] = tuple(
            tool if {"type", "function"} & tool.keys() else {"type": "function", "function": tool}
            for tool in found["tools"]
        )
    return found


def _context(context: Any) -> Any:
    return [{"role": "user", "content": check_text("context", context)}] if isinstance(context, str) else context


def _instruction(row: dict[str, Any]) -> str:
    given = [row.get(name) for name in ("instruction", "input") if not is_empty(row.get(name))]
    if not given:
        required(row, ("instruction",), str)
        raise BadRecord("instruction and input are empty")
    return "\n".join(check_text("instruction and input", part) for part in given)


def _history(row: dict[str, Any]) -> Turns:
    if is_empty(row.get("history")):
        return []
    turns = []
    for place, pair in enumerate(required(row, ("history",), list)[0]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRecord(f"history[{place}] must be a list with a user turn and the assistant's answer")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def _swift_messages(row: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return the name of the field with the chosen response, and the turns of the chosen conversation."""
    for name in ("messages", "conversations"):
        if not is_empty(row.get(name)):
            return name, required(row, (name,), list)[0]
    query, response = ("query", "response") if "query" in row else ("instruction", "output")
    asked = check_text("query", row["query"]) if query == "query" else _instruction(row)
    answer = required(row, (response,), str)[0]
    turns = [*_history(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return response, turns


def _response(name: str, part: Any) -> Turns | str:
    """Return a response as messages, or as the text of an assistant turn."""
    return part if isinstance(part, str) else turns_of(name, part)
