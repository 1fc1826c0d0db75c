"""Stop a run cleanly on a signal or a time limit: finish the step, save, and exit on all ranks together.

The problem: a scheduler announces the end of a job with a signal, or not at all. The ranks receive the signal at
different moments, and some ranks may not receive it. If one rank exited alone, the others would wait for it in a
collective, and nothing would be saved.

The solution: the signal handler only records the first signal. Between steps, all ranks reduce one number
(`Interruption.agreed`), so all of them learn of the signal after the same step. The trainer then saves, and all ranks
raise `Interrupted`, whose exit code tells the launcher to requeue the job. Later signals are ignored, so they cannot
interrupt the save that the first signal requested. `train.save_by` works the same way: rank 0 reads its clock and
requests a stop if one more step or evaluation, followed by a save, might exceed the time limit. The same number also
tells all ranks that a callback on one rank ends the run. Therefore one such reduction is enough after each step, and
after each evaluation.

During startup, this solution is not enough. Python runs a signal handler only between bytecode instructions, and a rank
that waits for other ranks inside a C call executes no bytecode. Therefore the C-level handler also writes the signal's
number to a socket (`signal.set_wakeup_fd`), and a thread reads the socket. If the rank does not reach its first call
of `agreed` within `MEETING_S` seconds of the signal, the thread ends the process with the exit code of `Interrupted`.
No work is lost, because training has not begun.

The handler itself does not save or exit, because it can run at any point of a step, when the state is incomplete and
differs between ranks.

Not covered: SIGKILL, and a grace period that is too short for one step and a save (Slurm: `KillWait`). For
`train.save_by`, the next step or evaluation is expected to take as long as the longest of the latest steps and
evaluations. The first step, evaluation or save can therefore exceed the limit. A rank that hangs during training never
calls `agreed`; in that case, the timeout of the collective ends the run.
"""

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

if TYPE_CHECKING:  # the handlers must be in place before torch is imported, which takes seconds
    import torch
    import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FINISH = 1
"""The number that means "end of the run" in :meth:`Interruption.agreed`. It is smaller than all of :data:`SIGNALS`."""
TIME = 128
"""The number that means "time limit" in :meth:`Interruption.agreed`. It is larger than all of :data:`SIGNALS`."""
MEETING_S = 15.0
"""Number of seconds for which a rank that received a signal during startup waits for the other ranks."""
RECENT = 16
"""Number of latest steps, and of latest evaluations, from which the next duration is estimated."""


class Interruption:
    """Record the first of :data:`SIGNALS` that this process receives, and share it with all ranks between steps.

    Use this class as a context manager, which installs signal handlers. If no signal was received, the previous
    handlers are restored on exit. Otherwise, :data:`SIGNALS` are ignored after the exit, so that no signal can
    interrupt the shutdown.

    received  number of the first signal received; 0 if there was none
    save_s    expected duration of a save in seconds, as set by the trainer
    finish    whether the run must end cleanly after this step. If one rank sets it, :meth:`agreed` sets it on all
              ranks, unless a signal or the time limit stops the run
    """

    def __init__(self) -> None:
        self.received = 0
        self.save_s = 0.0
        self.finish = False
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
        # Unlike close(), this ends the thread's recv even if a forked process has a copy of the socket.
        self._write.shutdown(socket.SHUT_WR)
        self._waiting.join()
        self._write.close()
        self._read.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _wait_for_others(self) -> None:
        # Read only the first signal's number, but do not close the socket. Python writes the number of each later
        # signal, too, and would report an error if it could not.
        number = self._read.recv(1)
        if number and not self._met.wait(MEETING_S):
            name = signal.Signals(number[0]).name
            try:
                sys.stderr.write(f"{name}: stopped before all ranks had started; no work was lost\n")
                sys.stderr.flush()
            finally:  # exit even if stderr is a broken pipe
                os._exit(record(Interrupted.exit_code))

    def limit(self, save_by: int | None) -> None:
        """Set the time limit: the run stops early enough to finish its save within ``save_by`` seconds of the start.

        The time counts from the start of the Slurm job or, without Slurm, of this process. ``None`` sets no limit.
        """
        if save_by is not None:
            started = os.environ.get("SLURM_JOB_START_TIME") or psutil.Process().create_time()
            self._save_by = float(started) + save_by

    def agreed(self, group: dist.ProcessGroup, device: torch.device, *, after: str | None = None) -> str | None:
        """Agree with all ranks on whether to stop.

        after   "step" or "evaluation" if a step or an evaluation has just finished; rank 0 then also checks the time
                limit

        Returns  on every rank, the reason to stop: the name of a signal, or ``train.save_by``. ``None``: end the run
                 cleanly if ``finish`` is set, or else continue

        *Collectives*: one MAX of a number over all ranks.
        """
        import torch
        import torch.distributed as dist

        self._met.set()
        due = after is not None and self._due(after) and group.rank() == 0
        mine = TIME if due else self.received or FINISH * self.finish
        flag = torch.full((), mine, dtype=torch.int64, device=device)  # torch.tensor would make the host wait
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        number = int(flag)
        if number == FINISH:
            self.finish = True
            return None
        if number == TIME:
            return "train.save_by"
        return signal.Signals(number).name if number else None

    def _due(self, after: str) -> bool:
        """Whether one more step or evaluation, followed by a save, might exceed the time limit."""
        now = time.time()
        if self._latest is not None:
            self._took[after].append(now - self._latest)
        self._latest = now
        if self._save_by is None:
            return False
        longest = max((seconds for took in self._took.values() for seconds in took), default=0.0)
        return now + longest + self.save_s > self._save_by
