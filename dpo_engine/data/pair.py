"""A preference pair, what a data format is, and what every pair is checked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_engine.data.conversation import Message, check_text, one_prompt
from dpo_engine.data.records import BadRecord
from dpo_engine.registry import Registry
from dpo_engine.strict_json import kind

FIELDS = ("prompt", "chosen", "rejected")
JUDGED = ("margin", "chosen_reward", "rejected_reward")
REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
NUMBERS = (*JUDGED, *REFERENCE_LOGPS)
UNREAD = ("tools", "images")
FEW = 64
"""Fields of a record that a message is made from: a record may have very many."""


@dataclass(frozen=True)
class Pair:
    """A prompt with a response that was preferred and one that was not.

    prompt    text, which the responses follow as they are; or the turns of a conversation up to a user's turn, rendered
              by the chat template
    chosen    text of the preferred response. A format may also give message lists, of the response or of the whole
              conversation, here and in `rejected`: :func:`checked` makes prompt and texts of them
    rejected  text of the other response
    weight    factor of this pair's loss, > 0
    margin    by how much chosen is better, in the unit of whoever judged; None where nobody said
    chosen_reward, rejected_reward  how good each response is, in the unit of whoever judged; None where nobody said
    ref_chosen_logps, ref_rejected_logps  summed log-probabilities under a reference that somebody scored; None where
              nobody did
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


Format = Callable[[dict[str, Any]], Pair | Sequence[Pair] | None]
FORMATS = Registry("data format")
"""Functions from a raw record to its `Pair`, or to all of its pairs; None, or no pairs, leaves the record out, which is
counted. One that may give several is registered with ``several=True``, so that `check` does not count records as pairs.

A format raises :class:`BadRecord` for a record it cannot use. It need not check texts, turns, weight and margin:
:func:`checked` does, for every format.
"""


def checked(pair: Pair) -> Pair:
    """The pair with its prompt and responses checked, and message lists taken apart.

    Raises :class:`BadRecord`: texts that are null, of another type, empty, of blanks only, or not whole Unicode;
    conversations that :func:`one_prompt` refuses; equal responses; a weight or margin that is no fit number.
    """
    prompt, chosen, rejected = parts = (pair.prompt, pair.chosen, pair.rejected)
    if all(isinstance(part, str) for part in parts):
        for name, part in zip(FIELDS, parts, strict=True):
            check_text(name, part)
    else:
        prompt, (chosen, rejected) = one_prompt(pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected})
    if chosen == rejected:
        raise BadRecord("chosen and rejected are the same")
    if chosen.strip() == rejected.strip():
        raise BadRecord("chosen and rejected are the same but for blanks around them")
    weight = fit_weight(pair.weight)
    numbers = {name: getattr(pair, name) for name in NUMBERS}
    numbers = {name: None if value is None else number(name, value) for name, value in numbers.items()}
    for name in REFERENCE_LOGPS:
        if numbers[name] is not None and numbers[name] > 0:
            raise BadRecord(f"{name} is {numbers[name]:g}; a log-probability is at most 0")
    return dataclasses.replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, weight=weight, **numbers)


def facts(row: dict[str, Any]) -> dict[str, Any]:
    """Weight and numbers, null meaning absent. Raises :class:`BadRecord` for content that no format here renders."""
    for name in UNREAD:
        if row.get(name):
            raise BadRecord(f"{name} are not supported")
    return {name: row[name] for name in ("weight", *NUMBERS) if row.get(name) is not None}


def fit_weight(value: Any) -> float:
    """A weight as a float. Raises :class:`BadRecord` unless it is a finite number > 0."""
    weight = number("weight", value)
    if weight <= 0:
        raise BadRecord(f"weight is {weight:g}; it must be > 0")
    return weight


def number(name: str, value: Any) -> float:
    """A finite float. Raises :class:`BadRecord` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(f"{name} is {kind(value)}, not a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRecord(f"{name} is {str(value)[:20]}; it must be a finite number")
    return found
