"""The interface of a sink, which records a run's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record the metrics of one step. `prefix` is added before the name of each metric."""

    def close(self) -> None:
        """Flush and close the sink."""


class ConsoleSink(Sink, Protocol):
    def say(self, text: str) -> None:
        """Print a message."""
