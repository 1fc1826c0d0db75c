"""The preference pair, the registry of data formats, and the checks that every pair must pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
FEW = 64
"""Maximum number of field names that an error message considers; a record may have very many."""


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response.

    prompt    text, which each response continues without a separator; or the turns of a conversation, the last one from
              the user, which the chat template renders
    chosen    text of the preferred response. A format may also return message lists here and in `rejected`, with the
              response or the whole conversation; :func:`checked` turns them into a prompt and texts
    rejected  text of the dispreferred response
    tools     JSON schemas of the functions that the assistant can call; the chat template renders them
    template_options  further variables for the chat template (`chat_template_kwargs`)
    weight    factor of this pair's loss, > 0
    margin    how much better chosen is, in the annotator's or reward model's unit; None if not given
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


Format = Callable[[dict[str, Any]], Pair | Sequence[Pair] | None]
FORMATS = Registry("data format")
"""Functions that turn a raw record into a `Pair` or a sequence of pairs.

A format that returns None or no pairs leaves the record out of training; such records are counted and reported. A
format that may return several pairs must be registered with ``several=True``; otherwise `check` counts each record as
one pair. With ``fields=(...)``, the names of the fields that a format reads, the keys of `data.columns` are checked.

A format raises :class:`BadRecord` for a record it cannot use. It need not check texts, turns, weight or margin;
:func:`checked` does that for every format.
"""


def checked(pair: Pair) -> Pair:
    """Check a pair, and split message lists into a prompt and two texts.

    Raises :class:`BadRecord` for a text that is null, of another type, empty, only whitespace or invalid Unicode; for
    conversations that :func:`one_prompt` rejects; for equal responses; for an invalid weight or other number.
    """
    prompt, chosen, rejected = parts = (pair.prompt, pair.chosen, pair.rejected)
    if all(isinstance(part, str) for part in parts):
        for name, part in zip(FIELDS, parts, strict=True):
            check_text(name, part)
    else:
        prompt, (chosen, rejected) = one_prompt(pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected})
    if chosen == rejected:
        raise BadRecord("chosen and rejected are identical")
    if chosen.strip() == rejected.strip():
        raise BadRecord("chosen and rejected differ only in surrounding whitespace")
    weight = fit_weight(pair.weight)
    numbers = {name: getattr(pair, name) for name in NUMBERS}
    numbers = {name: None if value is None else number(name, value) for name, value in numbers.items()}
    for name in REFERENCE_LOGPS:
        if numbers[name] is not None and numbers[name] > 0:
            raise BadRecord(f"{name} must be <= 0, as every log-probability is, not {numbers[name]:g}")
    return dataclasses.replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, weight=weight, **numbers)


def fit_weight(value: Any) -> float:
    """Return a weight as a float. Raises :class:`BadRecord` unless it is a finite number > 0."""
    weight = number("weight", value)
    if weight <= 0:
        raise BadRecord(f"weight must be > 0, not {weight:g}")
    return weight


def number(name: str, value: Any) -> float:
    """Return a number as a finite float. Raises :class:`BadRecord` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRecord(f"{name} must be a number, not {kind(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRecord(f"{name} must be a finite number, not {str(value)[:20]}")
    return found
