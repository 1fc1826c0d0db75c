"""Compare the identity of a run with that of its checkpoint, and apply accepted changes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_engine.batching.plan import Position
from dpo_engine.errors import CheckpointError
from dpo_engine.wording import show

ACCEPTED = {
    "dtype": "weights are rounded from the checkpoint's fp32 weights",
    "tokenizer": "held-out pairs and the exported checkpoint use the new tokenizer",
    "reference": "rewards are relative to the new reference, which starts from its own weights",
    "loss": "the next step uses the new loss; Adam's moments are kept",
    "train_data": "training starts at the first of the new pairs, and train.epochs counts from there",
    "limits": "pairs are truncated or dropped according to the new limits",
    "order": "training starts over at the first pair in the new order, and train.epochs counts from there",
    "global_batch_size": "the epoch continues with the next pair, in batches of the new size",
    "seed": "later randomness uses the new seed",
    "optim": "the next step uses the new settings; Adam's moments are kept, and the schedule continues at this step",
    "total_steps": "the learning rate follows the schedule for the new length",
}
"""Keys whose change can be accepted, and the effect. The key ``model`` is absent, because its weights would not fit."""

RESTARTING = ("train_data", "order")
"""Keys whose change invalidates the position in the data, so that the data starts over."""

COUNTING = (*RESTARTING, "global_batch_size")
"""Keys whose change also changes the number of steps. Accepting one of them accepts ``total_steps`` too."""

MISSING = object()

DIGEST = re.compile("[0-9a-f]{32,}")
"""A hash; messages show only its first digits."""


class Change(NamedTuple):
    """One key of the identity whose value differs from the checkpoint's."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """``loss.beta was 0.1 and is now 0.2``; of a nested value, only the entries that differ."""
        key, old, new = self
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name, MISSING) != new.get(name, MISSING)]
            if len(names) == 1:
                key, old, new = f"{key}.{names[0]}", old.get(names[0], MISSING), new.get(names[0], MISSING)
            else:
                old, new = ({name: facts[name] for name in names if name in facts} for facts in (old, new))
        return f"{key} was {_shown(old)} and is now {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value[:12]
    return "absent" if value is MISSING else show(value)


def compare(
    saved: Mapping[str, Any], current: Mapping[str, Any], accepted: Sequence[str] = (), *, where: str | Path
) -> list[Change]:
    """List the keys of ``current`` whose value differs in ``saved``. Keys that only ``saved`` has are ignored.

    accepted  keys that may differ
    where     names the checkpoint in messages

    Raises :class:`~dpo_engine.errors.CheckpointError` with a line for each change that is not accepted.
    """
    changes = [
        Change(key, saved.get(key, MISSING), value)
        for key, value in current.items()
        if saved.get(key, MISSING) != value
    ]
    if impossible := [f"{where}: {change}; {_MISFIT}" for change in changes if change.key not in ACCEPTED]:
        raise CheckpointError(impossible)  # other changes follow from these or no longer matter
    counts = any(change.key in COUNTING for change in changes)
    if refused := [change for change in changes if change.key not in (*accepted, *["total_steps"] * counts)]:
        raise CheckpointError(
            [
                f"{where}: {change}; restore the old value, set checkpoint.accept_changes=[{change.key}], or set "
                "another train.output_dir"
                for change in refused
            ]
        )
    return changes


_MISFIT = "the saved weights do not fit; restore the old value, or set another train.output_dir"


def next_position(saved: Mapping[str, Any], current: Mapping[str, Any], position: Position) -> Position:
    """The position in its data where a run with identity ``current`` continues after a checkpoint at ``position``."""
    restarts = any(saved.get(key, MISSING) != current[key] for key in RESTARTING)
    return Position(position.step, 0, 0) if restarts else position


def keeps_following(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether a reference that follows the policy continues with its weights from the checkpoint."""
    old, new = saved.get("reference") or {}, current.get("reference") or {}
    return "sync_every" in old and old.get("weights") == new.get("weights")


def keeps_random(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether the random generators are restored from the checkpoint; with a new seed they are not."""
    return saved.get("seed", MISSING) == current["seed"]


def entries(changes: Sequence[Change], step: int) -> list[dict[str, Any]]:
    """Changes as history entries: step, key, old and new value; null for a value that was absent."""
    return [{"step": step, "key": key, "old": None if old is MISSING else old, "new": new} for key, old, new in changes]


def accepted_lines(changes: Sequence[Change], accepted: Sequence[str], step: int) -> list[str]:
    """Log lines about ``checkpoint.accept_changes``: accepted changes with their effects, and keys without a change."""
    changed = {change.key for change in changes}
    return [
        *(f"change accepted after step {step}: {change}; {ACCEPTED[change.key]}" for change in changes),
        *(f"checkpoint.accept_changes: {key} has not changed" for key in accepted if key not in changed),
    ]
