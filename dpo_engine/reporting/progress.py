"""Show the progress of reading files, in the style of :mod:`~dpo_engine.platform.progress_line`."""

from __future__ import annotations

import time
from collections.abc import Callable

from dpo_engine.platform.progress_line import ProgressLine, choose_progress, pace


class Progress:
    """A display that shows nothing, and the base class of :class:`FileProgress`.

    between  function that is called after every update; it can raise an exception to stop the work
    """

    def __init__(self, between: Callable[[], None] = lambda: None):
        self._between = between

    def start(self, what: str, total: int) -> None:
        """Begin to show the progress of the work named `what`, which reads `total` bytes."""

    def update(self, done: int, count: int) -> None:
        """Show that `done` bytes have been read, and that `count` pairs were found in them."""
        self._between()

    def stop(self) -> None:
        """End the display. Calling this twice is safe."""


class FileProgress(Progress):
    """Show the percentage of the bytes that have been read, the pairs per second, and the time left."""

    def start(self, what: str, total: int) -> None:
        self._line, self._total = ProgressLine(what), total

    def update(self, done: int, count: int) -> None:
        if self._line.due:
            seconds = time.monotonic() - self._line.began
            rate = f"{count:,} pairs, {count / max(seconds, 1e-3):,.0f} pairs/s"
            self._line.show(pace(done, self._total, f"{self._total / 1e6:,.1f} MB", rate, seconds))
        super().update(done, count)

    def stop(self) -> None:
        self._line.clear()


def open_progress(mode: str, *, shown: bool = True, between: Callable[[], None] = lambda: None) -> Progress:
    """Open the display that `mode`, the value of `logging.progress`, selects.

    shown  whether this rank may print
    """
    choose_progress(mode)
    return FileProgress(between) if shown and mode != "off" else Progress(between)
