"""Render the conversations of a pair with the chat template, and check that the template keeps the record's text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_engine.data.conversation import REASONING, Message, plain
from dpo_engine.data.pair import Pair, as_turns
from dpo_engine.data.records import BadRecord, TemplateFault
from dpo_engine.data.tokenizer import Tokenizer

SPOKEN = frozenset("thought thoughts reasoning_details tool_call function_calls functions tools".split())
"""Fields of a message whose text only some templates read. `content`, `tool_calls` and the fields in `REASONING` are
not in this set."""
WAY_OUT = "use another data.chat_template, or set data.on_template_fault=allow"
DROPS_RESPONSE = "drops text of a response"
DROPS_PROMPT = "drops text of the prompt"
DROPS_EARLIER = "drops text of an earlier assistant turn"
DROPS_TOOLS = "drops tools"
NO_HEADER = "has no generation prompt with the role header, so each response begins with the header"
NEXT_HEADER = "writes the header of another turn after each response"
HARMLESS = (DROPS_EARLIER,)
"""Faults that are only counted. Templates of reasoning models cause them on purpose, in inference as well."""

ROLE_AT_END = re.compile(r"\S*\bassistant\b\W*$")

Chat = Callable[..., str]


@dataclass(frozen=True)
class Rendered:
    """A pair as text.

    prompt   the prompt, followed by the generation prompt if both responses begin with an assistant turn
    whole    both whole conversations: prompt and chosen response, prompt and rejected response
    scored   for each conversation, the start and end of every scored turn in the text; None if the whole response is
             scored
    tails    for each conversation, the control tokens that the template wrote after the text of the last turn, in
             reverse order
    faults   the ways in which the template changes the record's text
    """

    prompt: str
    whole: tuple[str, str]
    scored: tuple[list[tuple[int, int]] | None, list[tuple[int, int]] | None]
    tails: tuple[str, str] = ("", "")
    faults: frozenset[str] = frozenset()


def render(pair: Pair, tokenizer: Tokenizer, *, allow_faults: bool) -> Rendered:
    """Render a conversation pair.

    allow_faults  whether to return faults of the template instead of raising an error

    Raises :class:`BadRecord` if a scored turn cannot be located in the rendered conversation. Raises the errors of
    :meth:`Tokenizer.chat`. Without `allow_faults`, all faults except those in `HARMLESS` raise :class:`TemplateFault`.
    For example, this error is raised if the template drops text of a response, or puts a role header into a response.
    """
    responses = {"chosen": as_turns(pair.chosen), "rejected": as_turns(pair.rejected)}
    header = all(turns[0]["role"] == "assistant" for turns in responses.values())

    def chat(turns: Sequence[Message], *, header: bool = False) -> str:
        given = [plain(turn) for turn in turns]
        return tokenizer.chat(given, add_generation_prompt=header, tools=pair.tools, options=pair.template_options)

    prompt = chat(pair.prompt, header=header)
    whole = {name: chat([*pair.prompt, *turns]) for name, turns in responses.items()}
    faults: dict[str, str] = {}
    for name, turns in responses.items():
        if lost := _lost(turns, whole[name]):
            faults.setdefault(DROPS_RESPONSE, f"drops text of {name}: {lost}")
        elif header and (role := _header(prompt, turns[0], whole[name], tokenizer.has_generation_prompt)):
            faults[NO_HEADER] = f"has no generation prompt with {role!r}, so this header would be scored in responses"
        elif role := _next_header(prompt, turns[-1], whole[name]):
            faults[NEXT_HEADER] = f"writes {role!r} after each response, where it would be scored too"
    # Some templates render the prompt differently if a response follows. `encode_pairs` therefore keeps as the prompt
    # only the common prefix of the rendered prompt and both rendered conversations. Check that no text of the prompt is
    # missing from this prefix.
    kept = _common_start(prompt, *whole.values())
    asked = [turn for turn in pair.prompt if turn["role"] != "assistant"]
    calls = [{"tool_calls": turn["tool_calls"]} for turn in pair.prompt if "tool_calls" in turn]
    if lost := _lost([*asked, *calls], kept):
        faults[DROPS_PROMPT] = f"drops or moves text of prompt: {lost}"
    if _lost((turn for turn in pair.prompt if turn["role"] == "assistant"), kept):
        faults[DROPS_EARLIER] = ""
    if lost := [name for name in map(_function, pair.tools or ()) if name and name not in prompt]:
        faults[DROPS_TOOLS] = f"drops tools: {lost[0]}"
    for fault, what in faults.items():
        if fault not in HARMLESS and not allow_faults:
            raise TemplateFault(f"the chat template {what}; {WAY_OUT}")
    scored = [_scored(name, pair.prompt, turns, whole[name], chat, tokenizer) for name, turns in responses.items()]
    tails = [_tail(turns[-1], whole[name], tuple(tokenizer.end_names)) for name, turns in responses.items()]
    texts = (whole["chosen"], whole["rejected"])
    return Rendered(prompt, texts, (scored[0], scored[1]), (tails[0], tails[1]), frozenset(faults))


def _common_start(first: str, *others: str) -> str:
    """Return the common prefix. The function is fast if the prefix is the whole first text, as with most templates."""
    return first if all(text.startswith(first) for text in others) else os.path.commonprefix([first, *others])


def _tail(turn: Message, whole: str, controls: tuple[str, ...]) -> str:
    """Return the control tokens that the template wrote after the text of the last turn, in reverse order."""
    text, rest, tail = turn["content"].strip(), whole.rstrip(), ""
    while not (text and rest.endswith(text)) and rest.endswith(controls):
        token = next(name for name in controls if rest.endswith(name))
        rest, tail = rest.removesuffix(token).rstrip(), tail + token
    return tail


def _lost(turns: Iterable[Message], text: str) -> str:
    """Return the start of the first text that is missing from the rendered `text`, or "" if nothing is missing.

    The function looks for the texts of the turns and of their tool calls. Differences in whitespace are ignored.
    """
    squeezed = _squeeze(text)
    for turn in turns:
        said = [turn.get(key, "") for key in ("content", *REASONING)]
        said += [part for key in SPOKEN & turn.keys() for part in _spoken(turn[key])]
        for part in [*said, *(part for call in turn.get("tool_calls", ()) for part in _called(call))]:
            if _squeeze(part) not in squeezed and not any(form in squeezed for form in _escaped(part)):
                return repr(part.strip()[:30])
    return ""


def _spoken(value: Any) -> Iterator[str]:
    """Yield the texts in the value of a message's field: a text, a text part, a tool call, or a list of these."""
    for part in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            yield from [part["text"]] if isinstance(part.get("text"), str) else _called(part)


def _escaped(text: str) -> Iterator[str]:
    """Yield the forms that a text can have in a JSON or Python literal, without whitespace."""
    for literal in (json.dumps(text), json.dumps(text, ensure_ascii=False), repr(text)):
        yield _squeeze(literal[1:-1])


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _function(tool: Mapping[str, Any]) -> str:
    """Return the name of the function of a tool or of a tool call."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _called(call: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a tool call: the name of the function, and the names and values of the arguments."""
    yield _function(call)
    function = call.get("function", call)
    yield from _leaves(function.get("arguments") if isinstance(function, Mapping) else None)


def _leaves(value: Any) -> Iterator[str]:
    """Yield the names and texts inside a JSON value, and its numbers as text."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield name
            yield from _leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield str(value)


def _header(prompt: str, turn: Message, whole: str, has_generation_prompt: bool) -> str:
    """Return the header of the assistant's turn if the template makes it a part of the response, else "".

    Text between the prompt and the content of the turn may be a header. If the template has a generation prompt, only
    the word `assistant`, with or without punctuation, counts as a header. Any other text in this place, such as
    reasoning tags, is generated by the model itself.
    """
    start = turn["content"].strip()
    if not start:
        return ""
    before, found, _ = whole[len(_common_start(prompt, whole)) :].partition(start)
    if has_generation_prompt:
        return before.strip() if found and re.fullmatch(r"\W*assistant\W*", before) else ""
    return before.strip() if found and whole.startswith(prompt) else ""


def _next_header(prompt: str, turn: Message, whole: str) -> str:
    """Return the header of another assistant turn that the template writes after the last turn, or "".

    Text counts as a header only if the prompt ends with the same text. Other text with the name of the role, such as
    `</assistant>`, may be the end of the turn.
    """
    text = turn["content"].strip()
    found = ROLE_AT_END.search(whole.rstrip().rpartition(text)[2]) if text else None
    return found[0].strip() if found and prompt.rstrip().endswith(found[0].strip()) else ""


def _scored(
    name: str, prompt: Sequence[Message], turns: Sequence[Message], whole: str, chat: Chat, tokenizer: Tokenizer
) -> list[tuple[int, int]] | None:
    """Return the start and end of each scored turn in the rendered conversation; None if the response has one turn."""
    if len(turns) == 1:
        return None
    found, ends = [], [tokenizer.name_of(token) for token in sorted(tokenizer.end_ids)]
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant" or turn.get("weight") == 0:
            continue
        lead = [*prompt, *turns[:place]]
        before, upto = chat(lead), chat([*lead, turn]).rstrip()
        start, end = len(_common_start(chat(lead, header=True), whole)), len(upto)
        # A generation prompt may continue after the header with text that is also the start of the turn. That text is
        # scored.
        content = whole.find(turn["content"].strip(), len(before)) if turn["content"].strip() else -1
        start = min(start, content) if content >= 0 else start
        if not whole.startswith(upto):
            # Templates of reasoning models render the last turn differently from earlier turns, but write the same
            # end-of-turn token after all of them.
            marker = next((token for token in ends if upto.endswith(token)), None)
            end = whole.find(marker, start) + len(marker) if marker and marker in whole[start:] else 0
        if not whole.startswith(before) or _lost([turn], whole[start:end]):
            raise BadRecord(
                f"turn {place + 1} of {name} cannot be scored: the chat template renders it differently once other "
                "turns follow"
            )
        found.append((start, end))
    return found
