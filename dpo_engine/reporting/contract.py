"""The interface of a sink, which records a run's metrics, and the registry of sinks.

A sink is a class. It is registered under a name, and a run enables the sink by this name in ``logging.sinks``. One rank
creates an instance with ``Class(opening, **options)``, where ``opening`` is an :class:`Opening`. The other parameters
of the class are its options. If the sink cannot be opened, for example because a package or the network is missing, the
class raises :class:`CannotOpen` with the reason.
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
    directory   directory of the run's files, in which the sink can create its own folder
    start_step  step after which the run resumes; 0 for a new run
    """

    config: Config
    directory: Path
    start_step: int

    def recall(self, name: str) -> str | None:
        """Return the text that :meth:`remember` stored for the sink ``name``.

        Return None if the run does not resume, or if no text is stored.
        """
        path = self._path(name)
        return path.read_text(encoding="utf-8").strip() if self.start_step and path.exists() else None

    def remember(self, name: str, text: str) -> None:
        """Store a line of text, such as the id of a tracker's run. :meth:`recall` returns it if the run resumes."""
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
