"""Signals that ask a run to stop: the step is finished, the state is saved, all ranks leave together."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption:
    """Notes the first of :data:`SIGNALS` that this process gets, and tells all ranks about it between steps.

    As a context manager: handlers are put in place, and what stood there before comes back at the end. A second signal
    changes nothing, so that it cannot tear the save that the first one asked for.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group = group
        self.received = 0
        self._flag = torch.zeros((), dtype=torch.int64, device=device)
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def agreed(self) -> str | None:
        """The name of a signal that some rank has got, the same on every rank; ``None`` when none has.

        *Collectives*: one MAX of a number over all ranks.
        """
        self._flag.fill_(self.received)
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self.group)
        number = int(self._flag)
        return signal.Signals(number).name if number else None
