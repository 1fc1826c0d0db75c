"""Write a run's messages and metric lines to the file `log.txt` in the run's output directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from dpo_engine.atomic_files import naming
from dpo_engine.errors import printable, shorten
from dpo_engine.reporting.console import step_line

LOG = "log.txt"


class LogFile:
    """Append each line with its date and time, and write it to the file immediately.

    Every start of the run appends to the same file: first a line about the start, then the run's lines. Steps that are
    repeated after a restart are logged again, because this file records events. `metrics.jsonl` records results.
    """

    def __init__(self, path: Path, total_steps: int, start_step: int):
        self._path, self._total = path, total_steps
        again = path.exists() and path.stat().st_size > 0
        self._file = path.open("a", encoding="utf-8", buffering=1)
        what = f"{'started again' if again else 'started'} after step {start_step} of {total_steps}"
        self.say(f"--- {what}, process {os.getpid()} on {socket.gethostname()} ---")

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self.say(step_line(step, self._total, values, prefix))

    def say(self, text: str) -> None:
        """Write a message."""
        if not self._file.closed:
            with naming(self._path):
                self._file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def close(self) -> None:
        with suppress(OSError):  # the file is line-buffered, so say() has already raised any error
            self._file.close()

    def close_after(self, error: BaseException) -> None:
        """Write the error that ends the run, and close the file. Ignore ``OSError``: the storage may be full."""
        lines = getattr(error, "problems", None) or [f"{type(error).__name__}: {error}"]
        with suppress(OSError):
            for line in lines:
                self.say(f"ended: {shorten(printable(line))}")
        self.close()
