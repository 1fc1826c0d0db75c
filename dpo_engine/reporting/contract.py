"""The interface of a sink, which records a run's metrics, and the registry of sinks.

A sink is a class that is registered under the name that enables it in ``logging.sinks``. The engine calls it as
``Class(opening, **options)`` on one rank, with an :class:`Opening`. The other parameters of the class are its options.
If the sink cannot be opened, for example because a package or the network is missing, the class raises
:class:`CannotOpen` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from dpo_engine.config.run import Config
from dpo_engine.registry import Registry

SINKS = Registry("sink", passes=1)


class Opening(NamedTuple):
    """Data that a sink receives when it is opened.

    config      the run's configuration
    directory   directory of the run's files, where the sink may write a folder of its own
    start_step  step after which the run resumes; 0 for a new run
    """

    config: Config
    directory: Path
    start_step: int

    def recall(self, name: str) -> str | None:
        """Return the text that :meth:`remember` has stored for the sink ``name``; None for a new run."""
        path = self._path(name)
        return path.read_text(encoding="utf-8").strip() if self.start_step and path.exists() else None

    def remember(self, name: str, text: str) -> None:
        """Write a line of text, such as the id of a tracker's run, that :meth:`recall` returns to a resumed run."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.directory / name / "run_id"


class CannotOpen(Exception):
    """A sink cannot be opened: ``CannotOpen(reason, way_out)``, such as ``("no API key", "log in")``."""


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record the metrics of one step. `prefix` is added before the name of each metric."""

    def close(self) -> None:
        """Flush and close the sink."""


class ConsoleSink(Sink, Protocol):
    def say(self, text: str) -> None:
        """Print a message."""
