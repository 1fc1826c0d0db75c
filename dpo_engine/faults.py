"""Faults on request: `DPO_FAULT=<phase>:<rank>:<nth>:<action>` harms one rank at one moment, to rehearse what follows.

The n-th time that the rank (a number, or `*` for each) reaches the phase, the action happens to it. Several faults are
separated by commas. The variable is read once, by :func:`arm`; a job that Slurm or torchrun has started again has none,
so that a rehearsal ends. Unarmed, a phase costs one look into an empty dictionary.
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
    "rendezvous": "before the ranks meet",
    "data": "before the data is tokenised and opened",
    "load": "before a checkpoint is read",
    "reference": "before the reference scores a global batch",
    "forward": "before the policy's forward pass over a micro-batch",
    "reduce": "after the last backward pass of a step, before gradients are reduced",
    "optimizer": "before the weights are updated",
    "step": "after a step, before anything is logged or saved",
    "eval": "before held-out pairs are judged",
    "save-begin": "before a checkpoint's first byte",
    "save-shard": "when half of this rank's shard is written",
    "save-shards": "when this rank's shard is on the disk",
    "save-manifest": "when the manifest is on the disk, before the checkpoint gets its name",
    "save-rename": "when the checkpoint has its name",
    "save-pointer": "when `latest` names the checkpoint",
    "retention": "when one old checkpoint has been removed",
    "log": "before a line of metrics is written",
    "export": "before the weights are exported",
    "shutdown": "before the process groups are left",
}
NUMBERS = {
    "loss": "the loss of a micro-batch",
    "gradient": "the gradients of a step, before they are reduced",
    "reference-logps": "the reference's log-probabilities of a global batch",
}
SIGNALS = {"kill": "SIGKILL", "term": "SIGTERM", "usr1": "SIGUSR1", "int": "SIGINT", "stop": "SIGSTOP"}
FAILURES = {"enospc": errno.ENOSPC, "eio": errno.EIO}
FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 1000.0}
MOMENTS = (*SIGNALS, *FAILURES, "hang", "raise")


@dataclass
class Fault:
    """One fault of this rank, and how often its phase has been reached."""

    rank: int
    nth: int
    action: str
    reached: int = field(default=0, init=False)


_armed: dict[str, list[Fault]] = {}


def arm(rank: int, world: int, environment: Mapping[str, str] = os.environ) -> None:
    """Read the variable for the rank `rank` of `world`. Raises :class:`ConfigError` when it cannot mean anything."""
    _armed.clear()
    text = environment.get("DPO_FAULT", "")
    again = any(int(environment.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    for part in filter(None, text.split(",")):
        phase, where, nth, action = _parse(text, part)
        if where != "*" and int(where) >= world:
            raise ConfigError(f"DPO_FAULT={text}: there is no rank {where}; the run has ranks 0 to {world - 1}")
        if not again and where in ("*", str(rank)):
            _armed.setdefault(phase, []).append(Fault(rank, nth, action))


def _parse(text: str, part: str) -> tuple[str, str, int, str]:
    def wrong(what: str) -> ConfigError:
        return ConfigError(f"DPO_FAULT={text}: {what}")

    words = part.split(":")
    if len(words) != 4:
        raise wrong("must read <phase>:<rank>:<nth>:<action>, such as save-shard:1:2:kill")
    phase, where, nth, action = words
    if phase not in PHASES and phase not in NUMBERS:
        raise wrong(f"no phase {phase!r}; use one of {', '.join([*PHASES, *NUMBERS])}")
    if where != "*" and not where.isdecimal():
        raise wrong(f"rank {where!r} must be a number, or * for each")
    if not nth.isdecimal() or int(nth) < 1:
        raise wrong(f"{nth!r} must be 1 for the first time, 2 for the second, ...")
    allowed = MOMENTS if phase in PHASES else tuple(FACTORS)
    if action not in allowed:
        raise wrong(f"action {action!r} cannot happen at {phase}; use one of {', '.join(allowed)}")
    return phase, where, int(nth), action


def say_unmet() -> None:
    """Say, at the end of a run, which faults of this rank never came to pass."""
    for phase, faults in _armed.items():
        for fault in faults:
            if fault.reached < fault.nth:
                came = f"rank {fault.rank} came to {phase} {fault.reached} of {fault.nth} times"
                sys.stderr.write(f"DPO_FAULT: {came}: no {fault.action}\n")
    sys.stderr.flush()


def _due(phase: str) -> str | None:
    """The action that is due now that the phase is reached once more."""
    due = None
    for fault in _armed.get(phase, ()):
        fault.reached += 1
        if fault.reached == fault.nth:
            due = fault.action
            sys.stderr.write(f"DPO_FAULT: {phase}, time {fault.nth}, process {os.getpid()}: {due}\n")
            sys.stderr.flush()
    return due


def reach(phase: str, path: str | os.PathLike[str] | None = None) -> None:
    """Say that this rank is at `phase` of :data:`PHASES`; a due action happens here.

    path  the file at hand, which a failure of storage names

    Raises `OSError` or `RuntimeError` when that is the action.
    """
    action = _due(phase) if phase in _armed else None
    if action is None:
        return
    if action in SIGNALS:
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
    """What the quantity `number` of :data:`NUMBERS` is to be multiplied by this time; ``None``: leave it alone."""
    action = _due(number) if number in _armed else None
    return None if action is None else FACTORS[action]
