"""Fault injection: `DPO_FAULT=<phase>:<rank>:<nth>:<action>` makes a rank fail, or changes a value, at a chosen point.

The rank (a number, or `*` for every rank) performs the action when it reaches the phase for the n-th time. A fault can
also name a value instead of a phase. The action then multiplies the n-th occurrence of the value by a factor. Several
faults are separated by commas. :func:`arm` reads the variable once. In a job that Slurm or torchrun has restarted, no
faults are set, so that the restarted job can finish. Without faults, reaching a phase costs one lookup in an empty
dictionary.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from dpo_engine.errors import ConfigError

PHASES = {
    "rendezvous": "before the ranks connect to each other",
    "data": "before the data is tokenized and opened",
    "load": "before a checkpoint is read",
    "reference": "before the reference scores a global batch",
    "forward": "before the policy's forward pass on a micro-batch",
    "reduce": "after the last backward pass of a step, before the reduction of gradients is finished",
    "optimizer": "before the weights are updated",
    "step": "after a step, before its metrics are logged and a checkpoint is saved",
    "eval": "before an evaluation",
    "save-begin": "before the first byte of a checkpoint is written",
    "save-shard": "after half of this rank's shard is written",
    "save-shards": "after this rank's shard is flushed to the disk",
    "save-manifest": "after the manifest is flushed to the disk, before the checkpoint is renamed",
    "save-rename": "after the checkpoint is renamed to its final name",
    "save-pointer": "after `latest` points to the checkpoint",
    "retention": "after one old checkpoint is removed",
    "log": "before a line of metrics is written",
    "export": "before the weights are exported",
    "shutdown": "before the process groups are destroyed",
}
NUMBERS = {
    "loss": "the loss of a micro-batch",
    "gradient": "the gradients of a step, before they are reduced",
    "reference-logps": "the reference's log-probabilities for a global batch",
}
SIGNALS = {"kill": "SIGKILL", "term": "SIGTERM", "usr1": "SIGUSR1", "int": "SIGINT", "stop": "SIGSTOP"}
FAILURES = {"enospc": errno.ENOSPC, "eio": errno.EIO}
FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 1000.0}
MOMENTS = (*SIGNALS, *FAILURES, "hang", "raise")


@dataclass
class Fault:
    """A fault that is set on this rank, and how often its phase or value has occurred on this rank so far."""

    rank: int
    nth: int
    action: str
    reached: int = field(default=0, init=False)


_armed: dict[str, list[Fault]] = {}


def arm(rank: int, world: int, environment: Mapping[str, str] = os.environ) -> None:
    """Set the faults of `DPO_FAULT` for this rank, unless Slurm or torchrun has restarted the job.

    Raises :class:`ConfigError` if the variable is invalid.
    """
    _armed.clear()
    text = environment.get("DPO_FAULT", "")
    again = any(int(environment.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    for part in filter(None, text.split(",")):
        phase, where, nth, action = _parse(text, part)
        if where != "*" and int(where) >= world:
            raise ConfigError(f"DPO_FAULT={text}: rank {where} does not exist; use 0 to {world - 1}, or *")
        if not again and where in ("*", str(rank)):
            _armed.setdefault(phase, []).append(Fault(rank, nth, action))


def _parse(text: str, part: str) -> tuple[str, str, int, str]:
    def wrong(what: str) -> ConfigError:
        return ConfigError(f"DPO_FAULT={text}: {what}")

    words = part.split(":")
    if len(words) != 4:
        raise wrong("must have the form <phase>:<rank>:<nth>:<action>, such as save-shard:1:2:kill")
    phase, where, nth, action = words
    if phase not in PHASES and phase not in NUMBERS:
        raise wrong(f"unknown phase or value {phase!r}; use one of {', '.join([*PHASES, *NUMBERS])}")
    if where != "*" and not where.isdecimal():
        raise wrong(f"invalid rank {where!r}: use a number, or * for every rank")
    if not nth.isdecimal() or int(nth) < 1:
        raise wrong(f"invalid count {nth!r}: use 1 for the first occurrence, 2 for the second, ...")
    allowed = MOMENTS if phase in PHASES else tuple(FACTORS)
    if action not in allowed:
        raise wrong(f"{phase} has no action {action!r}; use one of {', '.join(allowed)}")
    return phase, where, int(nth), action


def say_unmet() -> None:
    """At the end of a run, report the faults of this rank that were not triggered."""
    for phase, faults in _armed.items():
        for fault in faults:
            if fault.reached < fault.nth:
                reached = f"rank {fault.rank} reached {phase} {fault.reached} of {fault.nth} times"
                sys.stderr.write(f"DPO_FAULT: {reached}, so {fault.action} was not triggered\n")
    sys.stderr.flush()


def _due(phase: str) -> str | None:
    """Count one more occurrence of the phase or value. Return the action that is due now, or None."""
    due = None
    for fault in _armed.get(phase, ()):
        fault.reached += 1
        if fault.reached == fault.nth:
            due = fault.action
            sys.stderr.write(f"DPO_FAULT: {phase}, occurrence {fault.nth}, process {os.getpid()}: {due}\n")
            sys.stderr.flush()
    return due


def reach(phase: str, path: str | os.PathLike[str] | None = None) -> None:
    """Count one more occurrence of `phase`, a key of :data:`PHASES`. If an action is due, perform it.

    path  the file that is being written; an injected storage error names it

    Raises `OSError` for the actions enospc and eio, and `RuntimeError` for the action raise.
    """
    action = _due(phase) if phase in _armed else None
    if action is None:
        return
    if action == "stop":
        # Send the signal to this thread, so that the process stops here. If the signal were sent to the process,
        # another thread might receive it first, and this thread would continue for a moment.
        signal.raise_signal(signal.SIGSTOP)
    elif action in SIGNALS:
        os.kill(os.getpid(), signal.Signals[SIGNALS[action]])
    elif action in FAILURES:
        code = FAILURES[action]
        raise OSError(code, os.strerror(code), None if path is None else str(path))
    elif action == "hang":
        while True:
            time.sleep(3600)
    else:
        raise RuntimeError(f"DPO_FAULT: {phase}")


def factor(number: str) -> float | None:
    """Count one more occurrence of the value `number`, a key of :data:`NUMBERS`.

    Return the factor by which the caller must multiply the value, or ``None`` if the value stays unchanged.
    """
    action = _due(number) if number in _armed else None
    return None if action is None else FACTORS[action]
