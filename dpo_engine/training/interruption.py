"""Signals, and a time limit, that ask a run to stop: the step is finished, all is saved, all ranks leave together."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from dpo_engine.errors import Interrupted
from dpo_engine.exit_code import record

if TYPE_CHECKING:  # handlers stand before torch is imported, which takes seconds
    import torch
    import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME = 128
"""What ranks tell each other when it is time to save; beyond every signal's number."""
MEETING_S = 15.0
"""How long a rank that got a signal waits for the others to start, so that all leave together."""
RECENT = 16
"""Steps, and evaluations, whose longest is how long the next may take."""


class Interruption:
    """Notes the first of :data:`SIGNALS` that this process gets, and tells all ranks about it between steps.

    As a context manager: handlers are put in place, and what stood there before comes back at the end, unless a signal
    came: then none can disturb what is left to do. A second signal changes nothing, so that it cannot tear the save
    that the first one asked for.
    """

    def __init__(self) -> None:
        self.received = 0
        self.save_s = 0.0
        self._met = threading.Event()
        self._before: dict[int, object] = {}
        self._save_by: float | None = None
        self._took = {what: deque[float](maxlen=RECENT) for what in ("step", "evaluation")}
        self._latest: float | None = None

    def __enter__(self) -> Interruption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._waking = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._waiting = threading.Thread(target=self._wait_for_others, daemon=True)
        self._waiting.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *error: object) -> None:
        self._met.set()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        signal.set_wakeup_fd(self._waking)
        self._write.shutdown(socket.SHUT_WR)  # which a copy in a forked process cannot prevent
        self._waiting.join()
        self._write.close()
        self._read.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _wait_for_others(self) -> None:
        # Python runs a handler between two of its own instructions, of which a rank that waits for others makes none;
        # the number comes through the socket at once.
        number = self._read.recv(1)  # it stays open: Python complains of a later signal that nobody could read
        if number and not self._met.wait(MEETING_S):
            name = signal.Signals(number[0]).name
            try:
                sys.stderr.write(f"{name}: stopped before all ranks had started; nothing was done that could be lost\n")
                sys.stderr.flush()
            finally:  # who reads stderr may be gone
                os._exit(record(Interrupted.exit_code))

    def limit(self, save_by: int | None) -> None:
        """Ask for a stop so that all is saved ``save_by`` seconds after the job's start, or else this process's."""
        if save_by is not None:
            started = os.environ.get("SLURM_JOB_START_TIME") or psutil.Process().create_time()
            self._save_by = float(started) + save_by

    def agreed(self, group: dist.ProcessGroup, device: torch.device, *, after: str | None = None) -> str | None:
        """What asks the run to stop, on some rank, the same on every rank; ``None`` when nothing does.

        after   "step" or "evaluation": one has been made, so that the time limit is looked at, by the clock of the
                first rank

        *Collectives*: one MAX of a number over all ranks.
        """
        import torch
        import torch.distributed as dist

        self._met.set()
        due = after is not None and self._due(after) and group.rank() == 0
        flag = torch.tensor(TIME if due else self.received, dtype=torch.int64, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        number = int(flag)
        if number == TIME:
            return "train.save_by"
        return signal.Signals(number).name if number else None

    def _due(self, after: str) -> bool:
        """Whether another step or evaluation and a save, as long as those before, might not end in time."""
        now = time.time()
        if self._latest is not None:
            self._took[after].append(now - self._latest)
        self._latest = now
        if self._save_by is None:
            return False
        longest = max((seconds for took in self._took.values() for seconds in took), default=0.0)
        return now + longest + self.save_s > self._save_by
