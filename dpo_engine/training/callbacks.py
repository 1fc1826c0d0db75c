"""Callbacks: objects that the training loop calls at its start and end, and after steps, evaluations and saves.

A callback observes a run and can end it. It does not change what a step computes: the weights after a step are the
same with and without callbacks, unless a callback writes to the weights.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.options import section_problems
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.registry import Registry
from dpo_engine.reporting.sinks import Sinks
from dpo_engine.wording import show

if TYPE_CHECKING:  # modules that define callbacks are also imported where Megatron is missing, to check a configuration
    from dpo_engine.optim.optimizer import Trained
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.run_data import RunData

CALLBACKS = Registry("callback")


class Run(Protocol):
    """The attributes of a run that callbacks can use; see :class:`~dpo_engine.training.trainer.Trainer`.

    step     number of steps done
    config   the run's configuration
    output   directory of the run's files
    engine   process groups, architecture, and objective
    data     pairs and plan
    trained  this rank's part of the policy, its optimizer, and its schedule
    sinks    ``sinks.say(line)`` prints and logs a line if rank 0 calls it; on all other ranks, it does nothing
    """

    step: int
    config: Config
    output: Path
    engine: Engine
    data: RunData
    trained: Trained
    sinks: Sinks


class Callback:
    """Base class of callbacks. The training loop calls its methods on every rank; a subclass overrides some of them.

    ``on_step``, ``on_eval`` and ``on_save`` can return a reason to end the run, such as ``"no gain in 3 evaluations"``.
    One rank that returns a reason is enough. The run then ends after the current step. If the reason comes from
    ``on_save``, or from an evaluation before the first step, the run ends one step later. Like a complete run, it has a
    last evaluation, a checkpoint, and an export.
    """

    def on_start(self, run: Run) -> None:
        """Called once, before the first step. If the run resumes, its checkpoint is already loaded."""

    def on_step(self, run: Run, metrics: dict[str, float]) -> str | None:
        """Called after each step. Numbers that rank 0 adds to ``metrics`` are logged with the step's metrics."""

    def on_eval(self, run: Run, metrics: dict[str, float]) -> str | None:
        """Called after each evaluation, with metrics named as in a step. In logs, they have the prefix ``eval/``."""

    def on_save(self, run: Run, directory: Path) -> str | None:
        """Called after a checkpoint is complete in ``directory``. A save can last for several training steps."""

    def on_end(self, run: Run) -> None:
        """Called when training ends, even if it ends with an error. Must not communicate with other ranks.

        An error that this method raises is only logged.
        """


class Callbacks:
    """The callbacks of a run, by the configuration key that enables each callback.

    asked   key and reason of the first callback that asked, on this rank, to end the run; None: no callback has asked
    """

    def __init__(self, callbacks: Mapping[str, Callback]):
        self.callbacks = dict(callbacks)
        self.asked: tuple[str, str] | None = None

    def start(self, run: Run) -> None:
        """Call ``on_start`` of every callback."""
        self._call("on_start", run)

    def step(self, run: Run, metrics: dict[str, float]) -> None:
        """Call ``on_step`` of every callback."""
        self._call("on_step", run, metrics)

    def evaluated(self, run: Run, metrics: dict[str, float]) -> None:
        """Call ``on_eval`` of every callback. Ranks wait for the callbacks of other ranks without a time limit."""
        self._without_limit(run, "on_eval", metrics)

    def saved(self, run: Run, directory: Path) -> None:
        """Call ``on_save`` of every callback. Ranks wait for the callbacks of other ranks without a time limit."""
        self._without_limit(run, "on_save", directory)

    def end(self, run: Run) -> None:
        """Call ``on_end`` of every callback. Errors are only logged, so that the run still writes its results."""
        for key, callback in self.callbacks.items():
            try:
                callback.on_end(run)
            except Exception as error:
                line = f"{key}: on_end failed: {type(error).__name__}: {error}"
                if run.engine.groups.world.rank() == 0:
                    run.sinks.say(line)
                else:  # the sinks of this rank print nothing
                    sys.stderr.write(f"{line}\n")

    def _without_limit(self, run: Run, event: str, *seen: object) -> None:
        if self.callbacks:
            world = run.engine.groups.world
            without_time_limit(world, lambda: self._call(event, run, *seen), Meter(f"callbacks, {event}"))

    def _call(self, event: str, run: Run, *seen: object) -> None:
        metrics: dict[str, Any] = seen[0] if seen and isinstance(seen[0], dict) else {}
        for key, callback in self.callbacks.items():
            before = dict(metrics)
            reason = getattr(callback, event)(run, *seen)
            if reason is not None:
                if not (isinstance(reason, str) and reason):
                    raise ConfigError(
                        f"{key}: {event} returned {show(reason)}; return None, or text with the reason to end the run"
                    )
                self.asked = self.asked or (key, reason)
            if any(metrics.get(name) is not value for name, value in before.items()):
                raise ConfigError(f"{key}: {event} changed or removed a metric; add metrics under other names")
            for name in metrics.keys() - before.keys():
                if not (isinstance(name, str) and isinstance(metrics[name], numbers.Real)):
                    raise ConfigError(f"{key}: {event} set the metric {name} to {show(metrics[name])}; set a number")
                metrics[name] = float(metrics[name])  # JSON files cannot contain numpy numbers


def callback_problems(config: Config) -> list[str]:
    """List the problems of ``callbacks``: names that are not registered, and wrong options."""
    return section_problems(CALLBACKS, config.callbacks, "callbacks", plugins=bool(config.plugins))


def open_callbacks(config: Config) -> Callbacks:
    """Return the callbacks that the run's configuration enables. Raises `ConfigError` for wrong names or options."""
    if problems := callback_problems(config):
        raise ConfigError(problems)
    return Callbacks({f"callbacks.{name}": CALLBACKS[name](**options) for name, options in config.callbacks.items()})


def setting(config: Config, key: str) -> Any:
    """Return the value at a dotted key, converted to JSON types; None if the key does not exist."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def still_stopped(record: dict[str, Any] | None, config: Config) -> dict[str, Any] | None:
    """Return ``record``, which describes a run's early end, or None if the setting that ended the run has changed."""
    return record if record and setting(config, record["by"]) == record["setting"] else None
