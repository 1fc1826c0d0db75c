"""Show the progress of long tasks in one style: the name, the completed percentage, the rate, and the time left.

On a terminal, one line is redrawn repeatedly, and erased at the end. Elsewhere, such as in a log file, a line is
printed at intervals. Work that takes less than `FIRST_S` seconds shows nothing.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dpo_engine.errors import printable
from dpo_engine.wording import clock

FIRST_S = 5.0
"""Seconds before anything is shown."""
EVERY_S = 15.0
"""Minimum number of seconds between two printed lines."""
REDRAW_S = 0.5
"""Minimum number of seconds between two drawings of a line on a terminal."""
ERASE = "\r\x1b[2K"

_mode = "auto"
_counts: Count | None = None


def choose_progress(mode: str) -> None:
    """Set how this process shows progress. ``mode`` is the value of ``logging.progress``; ``off`` shows nothing."""
    global _mode
    _mode = mode


class ProgressLine:
    """The progress display of one task. Elapsed times count from the creation of this object.

    what   name of the work, such as ``evaluating``
    shown  whether this process may show anything
    """

    def __init__(self, what: str, *, shown: bool = True):
        self.what = what
        self.shown = shown
        self.began = time.monotonic()
        self._due = self.began + FIRST_S
        self._drawn = False

    def wait(self) -> None:
        """Show nothing for the next `FIRST_S` seconds."""
        self._due = time.monotonic() + FIRST_S

    @property
    def due(self) -> bool:
        """Whether it is time to show something."""
        return self.shown and _mode != "off" and time.monotonic() >= self._due

    def show(self, text: str) -> None:
        """Show the name of the work and ``text``, if :attr:`due`."""
        if not self.due:
            return
        live = _live()
        self._due = time.monotonic() + (REDRAW_S if live else EVERY_S)
        line = printable(f"{self.what}: {text}")
        with suppress(OSError, ValueError):  # a closed stdout must not make the work fail
            sys.stdout.write(f"{ERASE}{line[: shutil.get_terminal_size().columns - 1]}" if live else f"{line}\n")
            sys.stdout.flush()
        self._drawn = live

    def clear(self) -> None:
        """Erase the line from a terminal, at the end of the work or before something else is printed."""
        if self._drawn:
            with suppress(OSError, ValueError):
                sys.stdout.write(ERASE)
                sys.stdout.flush()
            self._drawn = False


def _live() -> bool:
    """Whether a line on stdout can be redrawn, which is impossible while rich shows a live display there."""
    own = type(sys.stdout).__module__.startswith("rich")
    return not own and (_mode == "rich" or (_mode == "auto" and sys.stdout.isatty()))


def pace(done: float, total: float, amount: str, rate: str, seconds: float) -> str:
    """Return the progress as text, such as ``52% of 1,000 pairs, 33 pairs/s, 0:00:15 left``.

    done, total  completed and total amount, in any unit
    amount       the total amount, as text
    rate         the rate so far, as text
    seconds      time since the work began
    """
    share = min(1.0, done / total) if total else 1.0
    left = clock(seconds * (1 - share) / share) if share else "-"
    return f"{int(100 * share)}% of {amount}, {rate}, {left} left"


class Count:
    """Counter of the completed parts of a task; see :func:`counting`."""

    def __init__(self, line: ProgressLine, total: int, parts: int, unit: str):
        self.line = line
        self._total, self._parts, self._unit = total, max(1, parts), unit
        self._done = 0

    def add(self, parts: int) -> None:
        self._done += parts
        if self.line.due:
            seconds = time.monotonic() - self.line.began
            share = min(1.0, self._done / self._parts)
            rate = f"{share * self._total / max(seconds, 1e-3):,.4g} {self._unit}/s"
            self.line.show(pace(share, 1, f"{self._total:,} {self._unit}", rate, seconds))


@contextmanager
def counting(what: str, total: int, *, parts: int, unit: str = "pairs", shown: bool = True) -> Iterator[Count]:
    """Show the progress of the work in this block. Calls of :func:`advance` count the completed parts.

    total  size of the whole work, on all ranks, in ``unit``
    parts  sum of all numbers that this rank passes to :func:`advance`
    shown  whether this rank shows the progress
    """
    global _counts
    before, _counts = _counts, Count(ProgressLine(what, shown=shown), total, parts, unit)
    try:
        yield _counts
    finally:
        _counts.line.clear()
        _counts = before


def advance(parts: int) -> None:
    """Count parts of the work of the innermost :func:`counting` block. Outside of such a block, do nothing."""
    if _counts is not None:
        _counts.add(parts)
