"""Run work on files while the other ranks wait, even if the work takes longer than the time limit of collectives.

`parallel.timeout_s` limits collectives, so that a rank that hangs is noticed. It must not limit work on files, whose
duration depends on the size of the files and on the storage. Ranks therefore do not wait for such work in a collective,
but in a loop that reads the store that all ranks share. If another rank dies, a waiting rank still notices the death at
once, because the lifeline (TCP connections between the ranks; see :mod:`dpo_engine.platform.peer_watch`) reports it. In
addition, a thread of each rank increments a counter in the store, and each rank watches the counter of the previous
rank. These counters detect a rank whose process is suspended and, if there is no lifeline, the loss of a machine. They
do not detect a rank whose work never ends.

All ranks must make the same calls of :func:`without_time_limit`. Once any rank has reached a call, all other ranks
must reach the same call within the time limit. Every file access that may be slow therefore belongs inside such a call,
and not before it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from dpo_engine.errors import PeerError
from dpo_engine.platform.launcher import local_rank
from dpo_engine.platform.parallel import communication_error, together
from dpo_engine.platform.peer_watch import WAY_OUT
from dpo_engine.platform.progress_line import FIRST_S, ProgressLine, pace
from dpo_engine.wording import clock

T = TypeVar("T")

BEAT_S = 1.0
"""Seconds between two increments of a rank's counter."""
SILENT_S = 60.0
"""Seconds without an increment after which a rank counts as lost."""
POLL_S = (0.001, 1.0)
"""Initial and maximum number of seconds between two reads of the store."""

_calls = itertools.count(1)
_lost: dist.Store | None = None


class Meter:
    """The name of a long task, and this rank's progress. Rank 0 shows the progress of all ranks while ranks wait.

    what   name of the task, such as "saving the checkpoint for step 8"; without a name, no line is printed
    total  size of this rank's part of the work in bytes, 0 if unknown; can grow while the work runs
    done   number of bytes that this rank has processed so far
    quiet  whether printing is suspended, because the task has its own progress display

    One meter can be used for several calls of :func:`without_time_limit`, if every rank uses its meter for the same
    calls. The times in the printed lines count from the creation of the meter.
    """

    def __init__(self, what: str = "", total: int = 0):
        self.what = what
        self.total = total
        self.done = 0
        self.quiet = False
        self._line = ProgressLine(what)
        self._ended = float("-inf")
        self._key = ""
        self._reported = (0, 0)

    def add(self, size: int) -> None:
        """Count ``size`` more bytes as done."""
        self.done += size

    def open(self, key: str) -> None:
        """Begin a wait. All waits of a meter use the same two sums in the store: the bytes done, and all bytes.

        key   prefix of the keys of these sums; used only by the first wait
        """
        self._key = self._key or key
        if time.monotonic() - self._ended > FIRST_S:
            self._line.wait()

    def close(self) -> None:
        """End the wait."""
        self._line.clear()
        self._ended = time.monotonic()

    def report(self, store: dist.Store) -> tuple[int, int]:
        """Add this rank's progress to the sums in the store. Return both sums: the bytes done, and all bytes."""
        now, before = (self.done, self.total), self._reported
        self._reported = now
        done, total = (
            store.add(f"{self._key}/{name}", new - old)
            for name, new, old in zip(("bytes done", "bytes"), now, before, strict=True)
        )
        return done, total

    def show(self, done: int, total: int, working: int, ranks: int) -> None:
        """Show a line if one is due.

        done, total  bytes done and all bytes, on all ranks together
        working      number of ranks that have not finished
        ranks        number of all ranks
        """
        if not self.quiet and self._line.due:
            seconds = time.monotonic() - self._line.began
            self._line.show(_progress(seconds, done, total, working, ranks))


def _progress(seconds: float, done: int, total: int, working: int, ranks: int) -> str:
    """Return the text after the name in a progress line. ``seconds`` is the time since the meter was created."""
    amount = f"{total / 1e9:,.1f} GB" if total >= 1e9 else f"{total / 1e6:,.1f} MB"
    if 0 < done < total:
        return pace(done, total, amount, f"{done / seconds / 1e6:,.1f} MB/s", seconds)
    waited = f"waiting for {working} of {ranks} ranks, {clock(seconds)} so far"
    return f"100% of {amount}, {waited}" if done else waited


def first_on_node(group: dist.ProcessGroup, work: Callable[[], T], meter: Meter | None = None) -> T:
    """Call ``work`` on the first rank of each node; after all of these calls have returned, call it on the other ranks.

    Use this function for work that leaves files for the other ranks of the node, such as tokenization or a download.

    meter   as for :func:`without_time_limit`; no line is printed while rank 0 itself works, because ``work`` has its
            own progress display

    Returns what ``work`` returned on this rank.

    *Collectives*, Raises: as for two calls of :func:`without_time_limit`, one after the other.
    """
    meter = meter or Meter()
    first = local_rank() == 0

    def displayed() -> T:
        meter.quiet = True
        try:
            return work()
        finally:
            meter.quiet = False

    made = without_time_limit(group, displayed if first else lambda: None, meter)
    opened = without_time_limit(group, lambda: None if first else work(), meter)
    return made if first else opened  # type: ignore[return-value]


def from_first(group: dist.ProcessGroup, work: Callable[[], T], meter: Meter | None = None) -> T:
    """Run ``work`` on the first rank, however long it takes, and return its result on every rank.

    *Collectives*, Raises: as for :func:`without_time_limit`; in addition, one broadcast of an object.
    """
    found = [without_time_limit(group, work if group.rank() == 0 else lambda: None, meter)]
    dist.broadcast_object_list(found, group=group, group_src=0)
    return found[0]  # type: ignore[return-value]


def without_time_limit(group: dist.ProcessGroup, work: Callable[[], T], meter: Meter | None = None) -> T:
    """Run ``work`` as :func:`~dpo_engine.platform.parallel.together` does, but without a time limit for ``work``.

    group   must contain all ranks, because all ranks share the store
    meter   name and progress of the work, for the lines that rank 0 prints; either all ranks pass a meter, or none does

    *Collectives* over ``group``: one all-gather of objects before the work, and one after it. The time limit applies to
    both.
    If ``work`` fails on some ranks, this function raises an error on all ranks, after all ranks have finished; see
    :func:`~dpo_engine.platform.parallel.together`. Raises :class:`~dpo_engine.errors.PeerError` if a rank is lost.
    """
    meter = meter or Meter()
    if group.size() == 1 and not meter.what:
        return together(group, work)
    together(group, lambda: None)
    call = next(_calls)
    result, failure = None, None
    meter.open(f"long_work/{call}")
    with _beating(group, call, meter):
        try:
            result = work()
        except Exception as error:
            if communication_error(error):
                raise
            failure = error
        with _store() as store:
            if store is not None:
                store.add(_finished(call), 1)
                _wait_for_all(store, group, call)
    meter.close()

    def outcome() -> T:
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    return together(group, outcome)


@contextmanager
def _store() -> Iterator[dist.Store | None]:
    """Yield the store that all ranks share; None if it was lost.

    A RuntimeError in the block means that the store is lost. This function suppresses the error. If the launcher's
    store is lost, the ranks continue to work, but they can wait for each other only in collectives.
    """
    global _lost
    store = dist.distributed_c10d._get_default_store()
    try:
        yield None if store is _lost else store
    except RuntimeError:
        _lost = store


def _finished(call: int) -> str:
    """Return the key of the number of ranks that have finished their work in a call."""
    return f"long_work/{call}/finished"


def _beats(rank: int) -> str:
    """Return the key of a rank's counter, which increases while the rank is in a call."""
    return f"long_work/rank/{rank}"


def _wait_for_all(store: dist.Store, group: dist.ProcessGroup, call: int) -> None:
    if group.rank() == 0:
        store.delete_key(_finished(call - 1))  # all ranks have left the previous call
    watched = (group.rank() - 1) % group.size()
    pause, longest = POLL_S
    seen, since = -1, time.monotonic()
    while store.add(_finished(call), 0) < group.size():
        time.sleep(pause)
        pause = min(2 * pause, longest)
        beats, now = store.add(_beats(watched), 0), time.monotonic()
        if beats != seen:
            seen, since = beats, now
        elif now - since > SILENT_S:
            raise PeerError(f"rank {watched} has sent no heartbeat for {SILENT_S:g} s; {WAY_OUT}")


@contextmanager
def _beating(group: dist.ProcessGroup, call: int, meter: Meter) -> Iterator[None]:
    """Until the block ends, increment this rank's counter in the store every `BEAT_S` seconds, and show progress."""
    ended = threading.Event()

    def beat() -> None:
        with _store() as store:
            while store is not None and not ended.wait(BEAT_S):
                store.add(_beats(group.rank()), 1)
                if meter.what:
                    sums = meter.report(store)
                    if group.rank() == 0:
                        working = group.size() - store.add(_finished(call), 0)
                        meter.show(*sums, working, group.size())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
