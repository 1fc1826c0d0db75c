"""What may differ between a checkpoint and the run that resumes from it, and what follows from an accepted change."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_engine.batching.plan import Position
from dpo_engine.errors import CheckpointError
from dpo_engine.wording import show

ACCEPTED = {
    "dtype": "weights are rounded from the checkpoint's, which are fp32",
    "tokenizer": "held-out pairs and the exported checkpoint get the new one",
    "reference": "rewards are differences from the new one, which starts from its own weights",
    "loss": "the next step has the new one; Adam's moments are kept",
    "train_data": "the new pairs begin with their first, and train.epochs counts from there",
    "limits": "pairs are cut or dropped by the new ones",
    "order": "the pairs begin anew in the new order, and train.epochs counts from there",
    "global_batch_size": "the epoch goes on with the pair that is next, in batches of the new size",
    "seed": "what is random in later steps follows from the new one",
    "optim": "the next step has the new settings; Adam's moments are kept, and the schedule is that of the step",
    "total_steps": "the learning rate follows the schedule of the new length",
}
"""Keys whose change can be accepted, and what the run does then. A model's change cannot: its weights would not fit."""

RESTARTING = ("train_data", "order")
"""Keys whose change leaves nothing to go on from within the data."""

COUNTING = (*RESTARTING, "global_batch_size")
"""Keys whose change makes another number of steps: who accepts one of them accepts that."""

MISSING = object()

DIGEST = re.compile("[0-9a-f]{32,}")
"""A hash, which is told from another by its beginning."""


class Change(NamedTuple):
    """One key of the identity that is not what the checkpoint says."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """``loss.beta was 0.1 and is now 0.2``; of nested facts, those that differ."""
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
    return "not there" if value is MISSING else show(value)


def compare(
    saved: Mapping[str, Any], current: Mapping[str, Any], accepted: Sequence[str] = (), *, where: str | Path
) -> list[Change]:
    """Every key of ``current`` that ``saved`` has otherwise, all of them accepted; other keys of ``saved`` may be.

    where  names the checkpoint in messages

    Raises :class:`~dpo_engine.errors.CheckpointError` with a line for each change that is not accepted.
    """
    changes = [
        Change(key, saved.get(key, MISSING), value)
        for key, value in current.items()
        if saved.get(key, MISSING) != value
    ]
    if impossible := [f"{where}: {change}; {_MISFIT}" for change in changes if change.key not in ACCEPTED]:
        raise CheckpointError(impossible)  # and what else has changed is a consequence, or no longer matters
    counts = any(change.key in COUNTING for change in changes)
    if refused := [change for change in changes if change.key not in (*accepted, *["total_steps"] * counts)]:
        raise CheckpointError(
            [
                f"{where}: {change}; resume with what it was, set checkpoint.accept_changes=[{change.key}], or give "
                "another train.output_dir"
                for change in refused
            ]
        )
    return changes


_MISFIT = "its weights do not fit; resume with what it was, or give another train.output_dir"


def next_position(saved: Mapping[str, Any], current: Mapping[str, Any], position: Position) -> Position:
    """Where a run with the identity ``current`` goes on in its data after a checkpoint that had got to ``position``."""
    restarts = any(saved.get(key, MISSING) != current[key] for key in RESTARTING)
    return Position(position.step, 0, 0) if restarts else position


def keeps_following(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether a reference that follows the policy goes on with the weights that the checkpoint has of it."""
    old, new = saved.get("reference") or {}, current.get("reference") or {}
    return "sync_every" in old and old.get("weights") == new.get("weights")


def keeps_random(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether random generators go on where the checkpoint left them; another seed has just begun its own."""
    return saved.get("seed", MISSING) == current["seed"]


def entries(changes: Sequence[Change], step: int) -> list[dict[str, Any]]:
    """Changes as entries of a history: what changed after which step; null for what was not there."""
    return [{"step": step, "key": key, "old": None if old is MISSING else old, "new": new} for key, old, new in changes]


def accepted_lines(changes: Sequence[Change], accepted: Sequence[str], step: int) -> list[str]:
    """What the log says about ``checkpoint.accept_changes``: each change with its effect, and names of none."""
    changed = {change.key for change in changes}
    return [
        *(f"accepted after step {step}: {change}; {ACCEPTED[change.key]}" for change in changes),
        *(f"checkpoint.accept_changes: {key} is what it was" for key in accepted if key not in changed),
    ]
