"""Show the progress of long work on files: a bar on a terminal, or else a line at intervals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpo_engine.errors import printable
from dpo_engine.wording import clock

if TYPE_CHECKING:
    from rich.console import Console

FIRST_S = 5.0
"""Seconds before the first line on a plain console; shorter work prints no line."""
EVERY_S = 15.0
"""Seconds between the lines on a plain console."""


class Progress:
    """A display that shows nothing, and the base class of the other displays.

    between  called after every update; it may raise an exception to stop the work
    """

    def __init__(self, between: Callable[[], None] = lambda: None):
        self._between = between

    def start(self, what: str, total: int) -> None:
        """Start to show progress of the work named `what`, which reads `total` bytes."""

    def update(self, done: int, count: int) -> None:
        """Show that `done` bytes have been read, which produced `count` pairs."""
        self._between()

    def stop(self) -> None:
        """End the display. Calling this twice is safe."""


class PlainProgress(Progress):
    """Print lines to stdout, the first after `FIRST_S` seconds, and at most one every `EVERY_S` seconds."""

    def start(self, what: str, total: int) -> None:
        self._what, self._total = printable(what), total
        self._began = time.monotonic()
        self._due = self._began + FIRST_S

    def update(self, done: int, count: int) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + EVERY_S
            share = f"{100 * done // max(1, self._total)}% of {self._total / 1e6:,.1f} MB"
            speed = _speed(now - self._began, done, self._total, count)
            sys.stdout.write(f"{self._what}: {share}, {count:,} pairs, {speed}\n")
            sys.stdout.flush()
        super().update(done, count)


class BarProgress(Progress):
    """Show a bar, which disappears at the end."""

    def __init__(
        self, between: Callable[[], None] = lambda: None, *, force: bool = False, console: Console | None = None
    ):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        super().__init__(between)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            console=console or Console(force_terminal=True if force else None, highlight=False),
            transient=True,
        )

    def start(self, what: str, total: int) -> None:
        self._began, self._total = time.monotonic(), total
        self._task = self._bar.add_task(printable(what), total=max(1, total), speed="")
        self._bar.start()

    def update(self, done: int, count: int) -> None:
        speed = _speed(time.monotonic() - self._began, done, self._total, count)
        self._bar.update(self._task, completed=done, speed=speed)
        super().update(done, count)

    def stop(self) -> None:
        self._bar.stop()


def open_progress(mode: str, *, shown: bool = True, between: Callable[[], None] = lambda: None) -> Progress:
    """Open the display that `mode`, the value of `logging.progress`, selects.

    shown  whether this rank may print
    """
    if not shown or mode == "off":
        return Progress(between)
    if mode == "rich" or (mode == "auto" and sys.stdout.isatty()):
        return BarProgress(between, force=mode == "rich")
    return PlainProgress(between)


def _speed(seconds: float, done: int, total: int, count: int) -> str:
    """Return text with the rate so far and the remaining time at this rate."""
    left = clock(seconds * (total - done) / done) if done else "-"
    return f"{count / max(seconds, 1e-3):,.0f} pairs/s, {left} left"
