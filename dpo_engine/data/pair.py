"""The preference pair, the registry of data formats, and the checks that every pair must pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dpo_engine.data.conversation import Message, check_text, split_conversations
from dpo_engine.data.records import BadRecord
from dpo_engine.registry import Registry
from dpo_engine.strict_json import kind

FIELDS = ("prompt", "chosen", "rejected")
JUDGED = ("margin", "chosen_reward", "rejected_reward")
REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
NUMBERS = (*JUDGED, *REFERENCE_LOGPS)
FEW = 64
"""Maximum number of field names that are read from a record for an error message. A record may have many fields."""


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response.

    prompt    text, which each response continues without a separator; or the turns of a conversation, which the chat
              template renders. A format may return None if both responses are whole conversations
    chosen    text of the preferred response. Here and in `rejected`, a format may also return a list of messages: the
              response alone or the whole conversation. :func:`checked` splits such lists into the prompt and the turns
              of each response. A response that is a single assistant turn with only text is replaced by this text
    rejected  text or turns of the dispreferred response
    tools     JSON schemas of the functions that the assistant can call; the chat template renders them
    template_options  further variables for the chat template (`chat_template_kwargs`)
    weight    factor of this pair's loss, > 0
    divided   number of pairs among which the weight of the record was divided. If some of these pairs are dropped, the
              remaining pairs share the whole weight
    margin    by how much the chosen response is better, in the annotator's or reward model's unit; None if not given
    chosen_reward, rejected_reward  score of each response, in the annotator's or reward model's unit; None if not given
    ref_chosen_logps, ref_rejected_logps  summed log-probabilities under a reference model, given in the data; None
              if not given
    """

    prompt: str | Sequence[Message] | None
    chosen: str | Sequence[Message]
    rejected: str | Sequence[Message]
    weight: float = 1.0
    margin: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] | None = None
    divided: int = 1


Format = Callable[[dict[str, Any]], Pair | Sequence[Pair] | None]
FORMATS = Registry("data format")
"""Functions that turn a raw record into a `Pair` or a sequence of pairs.

If a format returns None or no pairs, the record is left out of training; such records are counted and reported. A
format that may return several pairs must be registered with ``several=True``; otherwise `check` counts each record as
one pair. ``fields=(...)`` lists the fields that a format reads. The keys of `data.columns` must be in this list or in
:data:`~dpo_engine.data.columns.OPTIONAL`; keys whose value is null are not checked. A plugin's format that is
registered without ``fields`` accepts any key.

A format raises :class:`BadRecord` for a record that it cannot use. A format need not check texts, turns, weight or
margin, because :func:`checked` checks them for every format.
"""


def checked(pair: Pair) -> Pair:
    """Check a pair, and split conversations into the prompt and the responses.

    Raises :class:`BadRecord` in these cases:

    - :func:`check_text` rejects a text, or :func:`split_conversations` rejects the conversations.
    - The responses are equal up to surrounding whitespace.
    - A pair of plain text has tools or template options, although no chat template renders plain text.
    - The weight is not positive, a log-probability is positive, or a number is not finite.
    """
    prompt, chosen, rejected = parts = (pair.prompt, pair.chosen, pair.rejected)
    if all(isinstance(part, str) for part in parts):
        for name, part in zip(FIELDS, parts, strict=True):
            check_text(name, part)
        for name, value in (("tools", pair.tools), ("template options", pair.template_options)):
            if value:
                raise BadRecord(f"{name} need a conversation, but prompt, chosen and rejected are plain text")
    else:
        named = {"chosen": pair.chosen, "rejected": pair.rejected}
        prompt, (chosen, rejected) = split_conversations(pair.prompt, named)
        chosen, rejected = as_text(chosen), as_text(rejected)
    if chosen == rejected:
        raise BadRecord("chosen and rejected are identical")
    if isinstance(chosen, str) and isinstance(rejected, str) and chosen.strip() == rejected.strip():
        raise BadRecord("chosen and rejected differ only in surrounding whitespace")
    weight = fit_weight(pair.weight)
    numbers = {name: getattr(pair, name) for name in NUMBERS}
    numbers = {name: None if value is None else number(name, value) for name, value in numbers.items()}
    for name in REFERENCE_LOGPS:
        if numbers[name] is not None and numbers[name] > 0:
            raise BadRecord(f"{name} is {numbers[name]:g}, but a log-probability must be <= 0")
    return dataclasses.replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, weight=weight, **numbers)


def as_text(response: str | Sequence[Message]) -> str | Sequence[Message]:
    """Return the text of a response that is one assistant turn with only text. Return other responses unchanged."""
    if not isinstance(response, str) and len(response) == 1 and response[0].keys() == {"role", "content"}:
        return response[0]["content"]
    return response


def as_turns(response: str | Sequence[Message]) -> list[Message]:
    """Return the turns of a response."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)


def fit_weight(value: Any) -> float:
    """Return a weight as a float. Raises :class:`BadRecord` unless it is a finite number > 0."""
    weight = number("weight", value)
    if weight <= 0:
        raise BadRecord(f"weight must be > 0, not {weight:g}")
    return weight


def number(name: str, value: Any) -> float:
    """Return a number as a float. Raises :class:`BadRecord` if the value is not a number or is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise BadRecord(f"{name} must be a number, not {kind(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRecord(f"{name} must be a finite number, not {str(value)[:20]}")
    return found
