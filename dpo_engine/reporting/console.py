"""Print metrics and messages on the console: plain lines, or a live progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dpo_engine.reporting.contract import ConsoleSink
from dpo_engine.wording import clock

if TYPE_CHECKING:
    from rich.console import Console

# Label and format of each metric on the console. Other metrics are written only to metrics.jsonl and the trackers.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/accuracies": ("accuracy", "{:.3f}"),
    "rewards/margins": ("margin", "{:+.4f}"),
    "displacement/chosen": ("displacement", "{:+.3f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "pairs_per_s": ("pairs/s", "{:.1f}"),
}
LIVE = ("loss", "rewards/accuracies", "rewards/margins", "pairs_per_s")


def open_console(progress: str, total_steps: int, start_step: int) -> ConsoleSink:
    """Open the console that `logging.progress` selects. With `auto`, it is a live bar if stdout is a terminal."""
    if progress == "rich" or (progress == "auto" and sys.stdout.isatty()):
        return RichConsole(total_steps, start_step, force=progress == "rich")
    return PlainConsole(total_steps, start_step, quiet=progress == "off")


class Clock:
    """Local time stamps for the end of metric lines: `HH:MM:SS`, preceded by the date in the first line of a new day.

    The stamp is not at the start of a line, so that lines can be selected by their first word (`step` or `eval`).
    """

    def __init__(self) -> None:
        self._day = datetime.now().date()

    def stamp(self) -> str:
        now = datetime.now()
        day, self._day = self._day, now.date()
        return f"{now:%H:%M:%S}" if now.date() == day else f"{now:%Y-%m-%d %H:%M:%S}"


def step_line(step: int, total: int, values: Mapping[str, float], prefix: str) -> str:
    """Return the line about the metrics of a step, or of an evaluation if `prefix` is `eval/`."""
    name = prefix.strip("/") or "step"
    first = f"{name} {step:>{len(str(total))}}/{total}" if name == "step" else f"{name} at step {step}"
    return "  ".join([first, *_shown(values, SHOWN)])


class PlainConsole:
    """Print each line immediately, without a progress bar, for log files and pipes. If `quiet`, print only messages."""

    def __init__(self, total_steps: int, start_step: int, *, quiet: bool):
        self._total, self._start, self._quiet = total_steps, start_step, quiet
        self._began: tuple[int, float] | None = None
        self._clock = Clock()

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        if self._quiet:
            return
        line = step_line(step, self._total, values, prefix)
        if not prefix:
            line += f"  eta {self._remaining(step)}"
        self.say(f"{line}  {self._clock.stamp()}")

    def _remaining(self, step: int) -> str:
        """Estimate the remaining time from the pace since the first printed step.

        The steps before it are not counted, because they are often slower.
        """
        now = time.monotonic()
        if self._began is None or step <= self._began[0]:
            self._began = (step, now)
            return "-" if step < self._total else "0:00:00"
        first, since = self._began
        return clock((now - since) / (step - first) * (self._total - step))

    def say(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def close(self) -> None:
        pass


class RichConsole:
    """Show a live line with steps, remaining time, and latest metrics; print evaluations and messages above it."""

    def __init__(self, total_steps: int, start_step: int, *, force: bool, console: Console | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console or Console(force_terminal=True if force else None, highlight=False)
        self._progress = Progress(
            MofNCompleteColumn(),
            # On a narrow terminal, shorten the bar to leave room for the metrics.
            BarColumn(bar_width=max(4, min(24, self._console.width - 76))),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
        )
        self._clock, self._total = Clock(), total_steps
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, metrics="")
        self._progress.start()

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        if prefix:
            self.say(f"{step_line(step, self._total, values, prefix)}  {self._clock.stamp()}")
        else:
            self._progress.update(self._task, completed=step, metrics="  ".join(_shown(values, LIVE)))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _shown(values: Mapping[str, float], names: Any) -> list[str]:
    return [f"{SHOWN[name][0]} {SHOWN[name][1].format(values[name])}" for name in names if name in values]
