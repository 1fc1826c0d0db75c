"""Tokenize pairs: find the boundary between prompt and response, end the responses, and apply the length limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError

from dpo_engine.config.sections import DataConfig
from dpo_engine.data.dataset import TokenPair, pair_digest, text_key
from dpo_engine.data.pair import NUMBERS, Pair, as_turns
from dpo_engine.data.records import BadRecord
from dpo_engine.data.rendering import Rendered, render
from dpo_engine.data.tokenizer import Tokenizer

LONG_PROMPT = "prompt longer than data.max_prompt_length"
LONG_PAIR = "prompt and response longer than data.max_length"
LEFT_OUT = "record left out by the data format"
LONG_RESPONSE = "a response too long for data.max_length"
LONG_COMPLETION = "a response longer than data.max_completion_length"
REPEATED = (
    "whose responses begin with the whole prompt, so the loss also covers this copy of the prompt; if this is not "
    "intended, set data.columns={prompt: null}, so that the prompt is taken from the responses"
)


@dataclass(frozen=True)
class Limits:
    """Length limits in tokens, the treatment of pairs that exceed them, and the other settings of tokenizing.

    If the prompt exceeds `max_prompt_length`, or the prompt and the longer response together exceed `max_length`, the
    prompt is truncated on the left (`truncation` "left") or the pair is dropped ("drop"). Both responses have the same
    prompt, so the prompt is truncated to fit the longer response.

    Responses are never truncated. A pair is dropped, even with "left", if its longer response exceeds
    `max_completion_length` or leaves no room for a prompt token. One prompt token is needed to predict the first token
    of the response. When a prompt is truncated, a BOS at its start is kept if there is room for the BOS and another
    prompt token.

    add_eos       whether to end each response with the EOS: never (False), always ("always"), or unless the chat
                  template has already ended the turn with another token (True or "auto")
    score         the tokens to score: those of the response ("response"), or all except the first ("all")
    allow_faults  whether to accept pairs whose text the chat template changes. Changes that are harmless
                  (:data:`~dpo_engine.data.rendering.HARMLESS`) are always accepted
    """

    max_length: int
    max_prompt_length: int | None
    truncation: str
    add_eos: bool | str
    score: str = "response"
    allow_faults: bool = False
    max_completion_length: int | None = None

    @classmethod
    def of(cls, data: DataConfig) -> Limits:
        """Take the settings from the configuration."""
        return cls(
            data.max_length,
            data.max_prompt_length,
            data.truncation,
            data.add_eos,
            data.score,
            data.on_template_fault == "allow",
            data.max_completion_length,
        )

    def cut(self, prompt: list[int], longer: int, bos_id: int | None) -> list[int] | str:
        """Return the prompt, truncated to fit a response of `longer` tokens, or the reason for dropping the pair."""
        if self.max_completion_length is not None and longer > self.max_completion_length:
            return LONG_COMPLETION
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
    """The result of tokenizing a pair: either `pair`, or `dropped`, the reason for dropping the pair.

    cut     whether the prompt was truncated on the left
    merged  whether the tokens at the end of the prompt change if a response follows. The pair's prompt then ends before
            these tokens
    ends    names of the end tokens with which the responses end; empty if they end without an end token
    faults  the ways in which the chat template changes the record's text
    masked  whether a response has tokens that are not scored
    repeated  whether both responses of a text pair begin with the whole prompt
    """

    pair: TokenPair | None
    dropped: str | None = None
    cut: bool = False
    merged: bool = False
    ends: frozenset[str] = frozenset()
    faults: frozenset[str] = frozenset()
    masked: bool = False
    repeated: bool = False


def dropped_text(dropped: Mapping[str, int]) -> str:
    """Return the part of an error message that counts dropped pairs by reason and says what to do.

    Returns "" if no pairs were dropped.
    """
    counts = "".join(f"; {count} dropped: {reason}" for reason, count in dropped.items())
    left_out = dropped.get(LEFT_OUT, 0)
    ways_out = ["raise the limit or shorten the records"] if sum(dropped.values()) > left_out else []
    ways_out += ["change the records or the data format"] if left_out else []
    return counts and f"{counts}; {', or '.join(ways_out)}"


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Tokenizer, limits: Limits, *, source: int
) -> list[Encoded | BadRecord]:
    """Tokenize checked pairs.

    Three texts are tokenized: the prompt alone, and the prompt with each response. The prompt of the token pair is the
    longest common prefix of the three token sequences. A token that spans the end of the prompt therefore belongs to
    the response, and prompt and response together have the tokens of the whole text. Source: the data preparation of
    TRL 1.16's `DPOTrainer`.

    Text pairs: the response follows the prompt without a separator. The tokenizer's prefix (its BOS) is prepended to a
    text that does not start with this prefix.

    Conversations: the chat template renders the prompt, with the generation prompt, and both whole conversations. In a
    response of several turns, only assistant turns whose weight is not 0 are scored.

    With `limits.add_eos`, each response ends with an end token. The EOS is an end token. In conversations, a control
    token that the chat template wrote after the response is an end token too, unless `limits.add_eos` is "always".
    If only whitespace follows the last end token, the whitespace is dropped. If other text follows that token, or if
    there is no end token, the EOS is appended.

    Returns  one result per pair, which is a :class:`BadRecord` if the pair cannot be used

    Raises :class:`ConfigError` from :meth:`Tokenizer.chat`.
    """
    out: list[Encoded | BadRecord | None] = [None] * len(pairs)
    texts: dict[bool, list[tuple[int, Rendered]]] = {False: [], True: []}
    for place, pair in enumerate(pairs):
        if isinstance(pair.prompt, str):
            whole = (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
            texts[False].append((place, Rendered(pair.prompt, whole, (None, None))))
            continue
        try:
            texts[True].append((place, render(pair, tokenizer, allow_faults=limits.allow_faults)))
        except TemplateError as error:
            out[place] = BadRecord(f"the chat template rejects this conversation: {error}")
        except BadRecord as what:
            out[place] = what
    for conversation, items in texts.items():
        columns = [
            tokenizer.encode_all([part(item) for _, item in items], rendered=conversation)
            for part in (lambda item: item.prompt, lambda item: item.whole[0], lambda item: item.whole[1])
        ]
        for (place, item), *ids in zip(items, *columns, strict=True):
            if not conversation:
                ids = [tokenizer.prefix + part if not _starts(part, tokenizer.prefix) else part for part in ids]
            try:
                out[place] = _encode(pairs[place], item, ids, conversation, tokenizer, limits, source)
            except BadRecord as what:
                out[place] = what
    assert None not in out
    return out


def _starts(ids: list[int], prefix: list[int]) -> bool:
    return ids[: len(prefix)] == prefix


def _encode(
    pair: Pair,
    item: Rendered,
    ids: list[list[int]],
    conversation: bool,
    tokenizer: Tokenizer,
    limits: Limits,
    source: int,
) -> Encoded:
    """Split both whole sequences into prompt and response, and apply the settings. Raises :class:`BadRecord`."""
    given, *whole = ids
    end = min(_common(given, one) for one in whole)
    if end == 0:
        if conversation:
            raise BadRecord("the chat template renders the prompt and the conversations without a common prefix")
        raise BadRecord(
            "the prompt alone and the prompt with a response start with different tokens; add a space after the prompt"
        )
    turns = (*(pair.prompt if conversation else ()), *as_turns(pair.chosen), *as_turns(pair.rejected))
    if limits.score == "all" and any(turn.get("weight") == 0 for turn in turns):
        raise BadRecord("a turn has weight 0, but data.score=all scores all turns; set data.score=response")
    masks = [
        None if spans is None else _mask(text, one, spans, tokenizer)[end:]
        for text, one, spans in zip(item.whole, whole, item.scored, strict=True)
    ]
    responses = [one[end:] for one in whole]
    if limits.add_eos:
        tails = item.tails if conversation and limits.add_eos != "always" else ("", "")
        responses = [_ended(part, tokenizer, tail) for part, tail in zip(responses, tails, strict=True)]
        last = [as_turns(response)[-1].get("weight") != 0 for response in (pair.chosen, pair.rejected)]
        masks = [
            None if mask is None else _fitted(mask, len(response), scored)
            for mask, response, scored in zip(masks, responses, last, strict=True)
        ]
    made = _fit(pair, (given[:end], *responses), masks, tokenizer, limits, source)
    ends = frozenset(tokenizer.name_of(part[-1]) for part in responses if part and part[-1] in tokenizer.end_ids)
    repeated = not conversation and all(_repeats(pair.prompt, part) for part in (pair.chosen, pair.rejected))
    return dataclasses.replace(made, merged=end < len(given), ends=ends, faults=item.faults, repeated=repeated)


def _repeats(prompt: str, response: str) -> bool:
    return response.lstrip().startswith(prompt.strip())


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    end = min(len(first), len(second))
    if first[:end] == second[:end]:
        return end
    return next(i for i in range(end) if first[i] != second[i])


def _mask(text: str, ids: list[int], spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> np.ndarray:
    """Return a mask of the tokens of a rendered conversation that are in the given spans of its text.

    A token that crosses the boundary of a span belongs to the text after the boundary. The same rule holds for the end
    of a prompt."""
    cuts = tokenizer.encode_all([text[:at] for span in spans for at in span], rendered=True)
    places = [_common(cut, ids) for cut in cuts]
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in zip(places[::2], places[1::2], strict=True):
        mask[start:stop] = True
    return mask


def _fitted(mask: np.ndarray, length: int, scored: bool) -> np.ndarray:
    """Fit a mask to a response that was cut or received an EOS.

    scored  whether the response's last turn is scored. If so, the EOS and the whitespace before it are scored too
    """
    if length <= len(mask):
        return mask[:length]
    fitted = np.append(mask, scored)
    if scored and mask.any():
        fitted[np.flatnonzero(mask)[-1] :] = True
    return fitted


def _ended(response: list[int], tokenizer: Tokenizer, tail: str) -> list[int]:
    """Cut the response after its last end token if only whitespace follows that token; otherwise, append the EOS.

    tail   the control tokens that the chat template wrote after the text of the response; they count as end tokens
    """
    eos = tokenizer.eos_id
    ends = {eos} | ({token for name, token in tokenizer.end_names.items() if name in tail} if tail else set())
    last = next((place for place in reversed(range(len(response))) if response[place] in ends), None)
    if last is not None and not tokenizer.decode(response[last + 1 :]).strip():
        return response[: last + 1]
    return [*response, eos]


def _fit(
    pair: Pair,
    ids: tuple[list[int], list[int], list[int]],
    masks: Sequence[np.ndarray | None],
    tokenizer: Tokenizer,
    limits: Limits,
    source: int,
) -> Encoded:
    """Apply the length limits and `score`.

    Raises :class:`BadRecord` for a prompt without tokens, for a response without tokens or with only the EOS, for a
    token that is not in the model's embedding, for equal responses, and for a response without scored tokens.
    """
    whole, chosen, rejected = ids
    for name, present in (
        ("prompt", whole),
        ("chosen", set(chosen) - {tokenizer.eos_id}),
        ("rejected", set(rejected) - {tokenizer.eos_id}),
    ):
        if not present:
            raise BadRecord(f"{name} has no tokens apart from the EOS")
    for token in max(whole), max(chosen), max(rejected):
        if tokenizer.rows is not None and token >= tokenizer.rows:
            raise BadRecord(
                f"token {tokenizer.name_of(token)!r} ({token}) is not in the model's embedding, which has "
                f"{tokenizer.rows} rows"
            )
    if chosen == rejected:
        raise BadRecord("chosen and rejected have identical tokens")
    for name, mask in zip(("chosen", "rejected"), masks, strict=True):
        if mask is not None and not mask.any():
            raise BadRecord(f"{name} has no scored tokens")
    prompt = limits.cut(whole, max(len(chosen), len(rejected)), tokenizer.bos_id)
    if isinstance(prompt, str):
        return Encoded(None, dropped=prompt)
    cut = len(prompt) < len(whole)
    if limits.score == "all":
        # Tokens are predicted from the tokens before them, so the first token cannot be scored and becomes the prompt.
        prompt, chosen, rejected = prompt[:1], prompt[1:] + chosen, prompt[1:] + rejected
        masks = [None, None]
    arrays = [np.array(part, dtype=np.int32) for part in (prompt, chosen, rejected)]
    given = {name: getattr(pair, name) for name in NUMBERS}
    numbers = {name: float("nan") if value is None else value for name, value in given.items()}
    kept = [None if mask is None or mask.all() else mask for mask in masks]
    made = TokenPair(
        *arrays,
        weight=pair.weight,
        digest=pair_digest(*arrays, *kept).hex(),
        source=source,
        prompt_text=text_key(pair.prompt),
        chosen_mask=kept[0],
        rejected_mask=kept[1],
        **numbers,
    )
    return Encoded(made, cut=cut, masked=any(mask is not None for mask in kept))
