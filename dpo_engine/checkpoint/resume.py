"""Compare a run's identity (the settings and data that determine its results) with its checkpoint's identity.

A difference stops the run unless its key is in :data:`ACCEPTED` and ``checkpoint.accept_changes`` lists this key. For
the key ``total_steps``, there is one exception; see :data:`COUNTING`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_engine.batching.plan import Position
from dpo_engine.checkpoint.directory import steps
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError
from dpo_engine.objective.losses import LOSSES
from dpo_engine.wording import show

ACCEPTED = {
    "dtype": "the model's weights are the checkpoint's fp32 weights, rounded to the new dtype",
    "tokenizer": "held-out pairs and the exported checkpoint use the new tokenizer",
    "reference": "rewards are relative to the new reference; its weights are restored from the checkpoint only if "
    "reference.sync_every stays set and the reference's initial weights are the same",
    "loss": "the next step uses the new loss; Adam's moments are kept",
    "train_data": "training starts at the first of the new pairs, and train.epochs counts from there",
    "limits": "the new settings determine how pairs are tokenized, which pairs are truncated or dropped, and which "
    "tokens are scored",
    "order": "training starts over at the first pair in the new order, and train.epochs counts from there",
    "global_batch_size": "the epoch continues with the next pair, in batches of the new size",
    "seed": "later randomness uses the new seed",
    "optim": "the next step uses the new settings; Adam's moments are kept, and the schedule continues at this step",
    "total_steps": "the learning rate follows the schedule for the new number of steps",
    "megatron": "the next step uses the new options",
}
"""Identity keys whose changes can be accepted, and the effect of each change.

``model``, ``adapter``, ``optim.optimizer`` and ``optim.freeze`` are not listed, because the saved state would not fit
the changed run.
"""

UNRECORDED = {"adapter": None, "optim.optimizer": "adamw", "optim.freeze": [], "megatron": {}}
"""Values to assume for keys that checkpoints of earlier versions do not record."""

RESTARTING = ("train_data", "order")
"""Keys whose change makes the saved data position invalid. Training then starts at the beginning of the data."""

COUNTING = (*RESTARTING, "global_batch_size")
"""Keys whose change also changes the number of steps. Accepting such a change also accepts a new ``total_steps``."""

MISSING = object()

DIGEST = re.compile("[0-9a-f]{32,}")
"""Pattern of a hash. Messages show only the first digits of a hash."""


class Change(NamedTuple):
    """One identity key whose value differs between the checkpoint (``old``) and the run (``new``)."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """Return the change as text, such as ``loss.beta was 0.1 and is now 0.2``.

        For a nested value, only the entries that differ are shown.
        """
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
    """Return a :class:`Change` for each key of ``current`` whose value in ``saved`` differs or is absent.

    A key in ``UNRECORDED`` that is absent has the assumed value.

    saved     identity of the run that saved the checkpoint
    current   identity of this run, or a part of it
    accepted  keys that may differ
    where     the checkpoint's name in error messages

    Raises :class:`~dpo_engine.errors.CheckpointError` with a line for each change that is not accepted. If some changes
    can never be accepted, only these are listed.
    """
    saved = {**UNRECORDED, **saved}
    changes = [
        Change(key, saved.get(key, MISSING), value)
        for key, value in current.items()
        if saved.get(key, MISSING) != value
    ]
    misfits = [change for change in changes if change.key not in ACCEPTED]
    if impossible := [
        f"{where}: {change}; the saved {_FIT.get(change.key, 'weights do')} not fit; restore the old value, or set "
        "another train.output_dir"
        for change in misfits
    ]:
        raise CheckpointError(impossible)  # the other changes may result from these, so omit the others
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


_FIT = dict.fromkeys(("optim.optimizer", "optim.freeze"), "optimizer state does")


def with_all_options(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved identity. If its loss is ``mix``, add the defaults of the options that its nested losses lack.

    Older checkpoints record only the options that the run file sets.
    """
    loss = saved.get("loss") or {}
    complete = getattr(LOSSES[loss["name"]], "complete", None) if loss.get("name") in LOSSES else None
    try:
        return {**saved, "loss": complete(loss)} if complete else saved
    except (LookupError, ValueError):  # a loss of another version, or of a plugin that is not loaded
        return saved


def refuse_unasked(config: Config) -> None:
    """Raise `CheckpointError` if the run has a checkpoint although ``checkpoint.resume`` is false."""
    if not config.checkpoint.resume and (there := steps(config.checkpoint_dir)):
        raise CheckpointError(
            f"train.output_dir={config.train.output_dir}: contains a checkpoint for step {there[-1]}, but "
            "checkpoint.resume is false; set checkpoint.resume=true, or another train.output_dir"
        )


def next_position(saved: Mapping[str, Any], current: Mapping[str, Any], position: Position) -> Position:
    """Return the data position at which a resumed run continues.

    saved      identity of the run that saved the checkpoint
    current    identity of this run
    position   data position at which the checkpoint was saved
    """
    restarts = any(saved.get(key, MISSING) != current[key] for key in RESTARTING)
    return Position(position.step, 0, 0) if restarts else position


def keeps_following(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether a periodically updated reference (``reference.sync_every``) gets its weights from the checkpoint."""
    old, new = saved.get("reference") or {}, current.get("reference") or {}
    return "sync_every" in old and old.get("weights") == new.get("weights")


def keeps_random(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether to restore the states of the random number generators from the checkpoint: true if seeds are equal."""
    return saved.get("seed", MISSING) == current["seed"]


def entries(changes: Sequence[Change], step: int) -> list[dict[str, Any]]:
    """Return the changes as history entries: step, key, old value, and new value.

    An old value of null means that the key was absent or null.
    """
    return [{"step": step, "key": key, "old": None if old is MISSING else old, "new": new} for key, old, new in changes]


def accepted_lines(changes: Sequence[Change], accepted: Sequence[str], step: int) -> list[str]:
    """Return the log lines about ``checkpoint.accept_changes``.

    There is one line for each accepted change, with its effect, and one line for each listed key that has not changed.
    """
    changed = {change.key for change in changes}
    return [
        *(f"change accepted after step {step}: {change}; {ACCEPTED[change.key]}" for change in changes),
        *(f"checkpoint.accept_changes: {key} has not changed" for key in accepted if key not in changed),
    ]
