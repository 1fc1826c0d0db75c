"""Read the fields of a message that say whether its turn is scored. Various systems define these fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dpo_engine.data.records import BadRecord

SCORED = re.compile(
    r"weight|train|training|trainable|train_on_(?:turn|message)|loss|(?:step_)?loss_mask|loss_(?:scale|weight)"
)
"""Names of fields whose value is 1 or true if the turn is scored, and 0 or false if it is not.

Sources: `weight` of OpenAI, `training` and `train` of Axolotl, `loss` and `loss_scale` of Megatron-SWIFT, `loss_weight`
of LLaMA-Factory, `step_loss_mask` of slime."""
MASKED = re.compile(r"masked")
"""Names of fields whose value is true if the turn is not scored. Source: torchtune's `Message`."""
WORDS = frozenset(
    "mask masks masked masking loss losses weight weights train training trainable trained ignore ignored supervise "
    "supervised learn".split()
)
"""Words in the names of masks, which are fields that can exclude a turn from the loss. A field whose name contains one
of these words is refused unless `SCORED` or `MASKED` defines its meaning, or its value is empty. The reason is that
systems use the same name with opposite meanings. For example, a field `mask` is 1 for scored tokens in some systems,
and 0 in others."""


def plain_name(name: str) -> str:
    """Return a field's name in lower case, with one underscore between words: `lossMask` becomes `loss_mask`."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).lower()


def turn_weight(here: str, message: Mapping[str, Any]) -> int | None:
    """Return 1 if a field marks the message's turn as scored, 0 if a field excludes the turn from the loss, else None.

    here  location of the message, for errors

    Fields that are null or empty are ignored.

    Raises :class:`BadRecord` for a field that may be a mask but has no clear meaning, for a mask whose value is neither
    0 nor 1, and for masks that contradict each other.
    """
    found: dict[str, int] = {}
    for name, kind in _kinds(tuple(message)):
        value = message[name]
        if value is None or value in ("", [], {}):
            continue
        if kind == "unknown":
            raise BadRecord(
                f"{here}.{name} may be a mask, but has no clear meaning; use the field weight (0 or 1) instead"
            )
        if value not in (0, 1):  # True and False are equal to 1 and 0
            no, yes = ("not scored", "scored") if kind == "scored" else ("scored", "not scored")
            raise BadRecord(f"{here}.{name} must be 0 ({no}) or 1 ({yes}), not {str(value)[:20]}")
        found[name] = int(value) if kind == "scored" else 1 - int(value)
    if len(set(found.values())) > 1:
        raise BadRecord(f"{here}: {' and '.join(found)} contradict each other; keep one of them")
    return next(iter(found.values()), None)


def is_mask(name: str) -> bool:
    """Return whether a field of a message may exclude its turn from the loss."""
    return bool(_kinds((name,)))


@lru_cache(maxsize=256)
def _kinds(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the fields that may be masks, each with the meaning of the value 1: "scored", "masked" or "unknown"."""
    return tuple((name, kind) for name in names if (kind := _kind(plain_name(name))))


def _kind(name: str) -> str | None:
    if SCORED.fullmatch(name):
        return "scored"
    if MASKED.fullmatch(name):
        return "masked"
    return "unknown" if WORDS.intersection(name.split("_")) else None
