"""Tokenize pairs: chat templates, the boundary between prompt and response, EOS tokens, and length limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError

from dpo_engine.data.dataset import TokenPair, pair_digest
from dpo_engine.data.pair import NUMBERS, Pair
from dpo_engine.data.records import BadRecord
from dpo_engine.data.tokenizer import Tokenizer

LONG_PROMPT = "prompt longer than data.max_prompt_length"
LONG_PAIR = "prompt and response longer than data.max_length"
LONG_RESPONSE = "a response alone longer than data.max_length"


@dataclass(frozen=True)
class Limits:
    """Length limits in tokens, and how to treat pairs that exceed them.

    If the prompt exceeds `max_prompt_length`, or the prompt and the longer response together exceed `max_length`, the
    prompt is truncated on the left (`truncation` "left") or the pair is dropped ("drop"). Both responses keep the same
    prompt, so it is truncated to fit the longer one.

    Responses are never truncated. The first token of a response is predicted from the last token of the prompt, so a
    pair is dropped, with "left" too, if its longer response leaves no room for one prompt token. A BOS at the start of
    a truncated prompt is kept if another prompt token fits beside it.
    """

    max_length: int
    max_prompt_length: int | None
    truncation: str
    add_eos: bool

    def cut(self, prompt: list[int], longer: int, bos_id: int | None) -> list[int] | str:
        """Return the prompt, truncated to fit a response of `longer` tokens, or the reason for dropping the pair."""
        room = self.max_length - longer
        if room < 1:
            return LONG_RESPONSE
        if self.max_prompt_length is not None and self.max_prompt_length < room:
            room, reason = self.max_prompt_length, LONG_PROMPT
        else:
            reason = LONG_PAIR
        if len(prompt) <= room:
            return prompt
        if self.truncation == "drop":
            return reason
        if prompt[0] == bos_id and room > 1:
            return [prompt[0], *prompt[len(prompt) - room + 1 :]]
        return prompt[-room:]


@dataclass(frozen=True)
class Encoded:
    """The result of tokenizing a pair: either `pair`, or `dropped`, the reason for dropping it.

    cut     whether the prompt was truncated on the left
    merged  whether the tokens of prompt and conversation diverge before the end of the prompt
    """

    pair: TokenPair | None
    dropped: str | None = None
    cut: bool = False
    merged: bool = False


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Tokenizer, limits: Limits, *, source: int
) -> list[Encoded | BadRecord]:
    """Tokenize checked pairs.

    Text pairs: prompt and responses are tokenized separately, so that the boundary is exact. The tokenizer's prefix
    (its BOS) is prepended to a prompt that does not start with it. With `limits.add_eos`, the EOS is appended to a
    response that does not end with it.

    Conversations: the chat template renders the prompt, with the generation prompt, and both whole conversations. The
    common prefix of the tokens of all three is the prompt; usually that is all of the rendered prompt. With
    `limits.add_eos`, a response ends at the EOS that the template wrote, without whitespace after it; if there is none,
    the EOS is appended.

    Returns  one result per pair; a :class:`BadRecord` if the template rejects the pair or its tokens are unusable
    """
    out: list[Encoded | BadRecord | None] = [None] * len(pairs)
    texts: dict[bool, list[tuple[int, tuple[str, str, str]]]] = {False: [], True: []}
    for place, pair in enumerate(pairs):
        if isinstance(pair.prompt, str):
            texts[False].append((place, (pair.prompt, pair.chosen, pair.rejected)))
            continue
        try:
            texts[True].append((place, _rendered(pair, tokenizer)))
        except TemplateError as error:
            out[place] = BadRecord(f"the chat template rejects this conversation: {error}")
    for conversation, items in texts.items():
        columns = [tokenizer.encode_all([item[part] for _, item in items], rendered=conversation) for part in range(3)]
        for (place, _), prompt, chosen, rejected in zip(items, *columns, strict=True):
            try:
                end = len(prompt)
                if conversation:
                    prompt, chosen, rejected = _split(prompt, chosen, rejected)
                elif prompt[: len(tokenizer.prefix)] != tokenizer.prefix:
                    prompt = tokenizer.prefix + prompt
                if limits.add_eos:
                    chosen, rejected = (_with_eos(response, tokenizer) for response in (chosen, rejected))
                made = _fit(pairs[place], (prompt, chosen, rejected), tokenizer, limits, source)
                out[place] = dataclasses.replace(made, merged=conversation and len(prompt) < end)
            except BadRecord as what:
                out[place] = what
    assert None not in out
    return out


def _rendered(pair: Pair, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Render the prompt alone, and both whole conversations."""
    whole = [
        tokenizer.chat([*pair.prompt, {"role": "assistant", "content": response}], add_generation_prompt=False)
        for response in (pair.chosen, pair.rejected)
    ]
    return tokenizer.chat(pair.prompt, add_generation_prompt=True), whole[0], whole[1]


def _split(prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Split both conversations after the prefix that they share with the prompt. Return prompt, chosen, rejected."""
    end = min(_common(prompt, chosen), _common(prompt, rejected))
    if end == 0:
        raise BadRecord("the chat template renders prompt and conversations with no common prefix")
    return prompt[:end], chosen[end:], rejected[end:]


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    end = min(len(first), len(second))
    if first[:end] == second[:end]:
        return end
    return next(i for i in range(end) if first[i] != second[i])


def _with_eos(response: list[int], tokenizer: Tokenizer) -> list[int]:
    """Cut the response after its last EOS if only whitespace follows; otherwise append the EOS."""
    eos = tokenizer.eos_id
    if eos in response:
        end = len(response) - response[::-1].index(eos)
        if not tokenizer.decode(response[end:]).strip():
            return response[:end]
    return [*response, eos]


def _fit(
    pair: Pair, ids: tuple[list[int], list[int], list[int]], tokenizer: Tokenizer, limits: Limits, source: int
) -> Encoded:
    """Apply the length limits. Raises :class:`BadRecord` for a part without tokens and for equal responses."""
    whole, chosen, rejected = ids
    for name, present in (
        ("prompt", whole),
        ("chosen", set(chosen) - {tokenizer.eos_id}),
        ("rejected", set(rejected) - {tokenizer.eos_id}),
    ):
        if not present:
            raise BadRecord(f"{name} has no tokens")
    if chosen == rejected:
        raise BadRecord("chosen and rejected have identical tokens")
    prompt = limits.cut(whole, max(len(chosen), len(rejected)), tokenizer.bos_id)
    if isinstance(prompt, str):
        return Encoded(None, dropped=prompt)
    arrays = [np.array(part, dtype=np.int32) for part in (prompt, chosen, rejected)]
    given = {name: getattr(pair, name) for name in NUMBERS}
    numbers = {name: float("nan") if value is None else value for name, value in given.items()}
    made = TokenPair(*arrays, weight=pair.weight, digest=pair_digest(*arrays).hex(), source=source, **numbers)
    return Encoded(made, cut=len(prompt) < len(whole))
