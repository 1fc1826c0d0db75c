"""Prepare the data of the next step on a second thread while the current step runs.

Problem. To plan a global batch and build its micro-batches, the host needs a few milliseconds to several hundred
milliseconds. During this time, a GPU would be idle, because the previous step has ended and no micro-batch of the next
step exists.

Solution. While a step runs, a second thread makes the next step's :class:`StepData` in host memory, page-locked if the
device is a GPU. The main thread only starts the copies to the device, which do not block.

Why this is safe. The data of a step depends only on the step's number. The second thread reads the plan and the
memory-mapped pairs, but does not communicate or use the device. Therefore the results and the order of pairs are the
same as without the thread. If the run stops, a step that is prepared but not run has no effect. If the preparation
fails, the main thread raises the error at the step that needs the data. The thread ends with the training loop, so that
a later fork does not copy a process in which the thread runs.

Not covered. The Python interpreter runs one thread at a time, so the second thread can delay the main thread. On a GPU,
this delay is usually harmless, because the main thread mostly waits for the device, or for room in the device's queue
of kernel launches. But if the launches limit the speed of a step, preparing the next step slows the current step down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dpo_engine.batching.batches import Batch
from dpo_engine.data.dataset import PairDataset
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.objective import BatchFacts
from dpo_engine.training.work import Work, count_work

T = TypeVar("T")


@dataclass(frozen=True)
class StepData:
    """The data of a step.

    known   facts about the global batch
    work    work of the global batch, for the throughput metrics
    copies  for each micro-batch of this rank, a function that copies it to the device
    """

    known: BatchFacts
    work: Work
    copies: list[Callable[[], Batch]]

    def batches(self) -> list[Batch]:
        """Start to copy this rank's micro-batches to the device, and return the micro-batches on the device."""
        return [copy() for copy in self.copies]


def step_data(engine: Engine, pairs: PairDataset, indices: np.ndarray) -> StepData:
    """Prepare a step over the pairs ``indices`` in host memory, without communication."""
    made = engine.host_batches(pairs, indices)
    work = count_work(engine, pairs, indices, made)
    copies = [batch.packed_for(engine.platform.device) for batch in made]
    return StepData(batch_facts(pairs, indices), work, copies)


class OneAhead(Generic[T]):
    """Numbered items, each of which a second thread makes while the caller uses the previous item."""

    def __init__(self, make: Callable[[int], T], stop: int):
        """Create the second thread, but make no items yet.

        make  returns the item with a given number; called only on the second thread
        stop  the last item has the number ``stop - 1``
        """
        self._make = make
        self._stop = stop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next step")
        self._coming: tuple[int, Future[T]] | None = None

    def take(self, number: int) -> T:
        """Return the item with this number.

        If the latest :meth:`begin` was for this number, the item may be ready. Otherwise, the second thread makes the
        item now. Each :meth:`begin` serves only the next call of this method.

        Raises the error that ``make`` raised.
        """
        coming, self._coming = self._coming, None
        ready = coming[1] if coming and coming[0] == number else self._thread.submit(self._make, number)
        return ready.result()

    def begin(self, number: int) -> None:
        """Begin to make the item with this number, if the number is less than ``stop``."""
        if number < self._stop:
            self._coming = number, self._thread.submit(self._make, number)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def one_ahead(make: Callable[[int], T], numbers: range) -> Iterator[T]:
    """Yield the item of each number. A second thread makes the next item while the caller uses the current one."""
    items = OneAhead(make, numbers.stop)
    try:
        for number in numbers:
            item = items.take(number)
            items.begin(number + 1)
            yield item
    finally:
        items.close()
