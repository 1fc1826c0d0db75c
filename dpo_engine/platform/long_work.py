"""Run work that may take longer than the time limit of collectives, while the other ranks wait.

`parallel.timeout_s` limits collectives, so that a rank that hangs is noticed. It must not limit work on files, whose
duration depends on their size. Ranks therefore wait in a loop, outside of collectives. If another rank dies, a waiting
rank still notices at once, because the lifeline reports it. In addition, a thread of each rank increments a counter in
the store of all ranks, and each rank watches the counter of the rank before it. This detects a rank whose process is
stopped and, if there is no lifeline, a machine that was lost. It does not detect a rank whose work never ends.
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
from dpo_engine.platform.device import local_rank
from dpo_engine.platform.parallel import ParallelGroups, communication_error, together
from dpo_engine.platform.peer_watch import WAY_OUT

T = TypeVar("T")

BEAT_S = 1.0
"""Seconds between two increments of a rank's counter."""
SILENT_S = 60.0
"""Seconds without an increment after which a rank counts as lost."""
POLL_S = (0.01, 1.0)
"""Initial and maximum number of seconds between two reads of the store."""

_calls = itertools.count()


def first_on_node(groups: ParallelGroups, work: Callable[[], T]) -> T:
    """Call ``work`` on the first rank of each node; after all of these calls have returned, call it on the other ranks.

    Use it for work that leaves files for the other ranks of the node: tokenizing into a cache, or a download.

    Returns what ``work`` returned on this rank.

    *Collectives*, Raises: as for :func:`without_time_limit`.
    """
    first = local_rank() == 0
    made = without_time_limit(groups.world, work if first else lambda: None)
    opened = without_time_limit(groups.world, lambda: None if first else work())
    return made if first else opened  # type: ignore[return-value]


def without_time_limit(group: dist.ProcessGroup, work: Callable[[], T]) -> T:
    """Run ``work`` on this rank like :func:`~dpo_engine.platform.parallel.together`, however long it takes.

    group   must contain all ranks, because all ranks share the store

    *Collectives* over ``group``: one gather of objects before the work and one after it, within the time limit.
    Raises the error of the first rank on which ``work`` raised, on all ranks, after all ranks have finished;
    :class:`~dpo_engine.errors.PeerError` if a rank is lost.
    """
    if group.size() == 1:
        return together(group, work)
    together(group, lambda: None)
    store = dist.distributed_c10d._get_default_store()
    name = f"long_work/{next(_calls)}"
    result, failure = None, None
    with _beating(store, f"{name}/{group.rank()}"):
        try:
            result = work()
        except Exception as error:
            if communication_error(error):
                raise
            failure = error
        store.add(f"{name}/done", 1)
        _wait_for_all(store, name, group)

    def outcome() -> T:
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    return together(group, outcome)


def _wait_for_all(store: dist.Store, name: str, group: dist.ProcessGroup) -> None:
    watched = (group.rank() - 1) % group.size()
    pause, longest = POLL_S
    seen, since = -1, time.monotonic()
    while store.add(f"{name}/done", 0) < group.size():
        time.sleep(pause)
        pause = min(2 * pause, longest)
        beats, now = store.add(f"{name}/{watched}", 0), time.monotonic()
        if beats != seen:
            seen, since = beats, now
        elif now - since > SILENT_S:
            raise PeerError(f"rank {watched} has given no sign of life for {SILENT_S:g} s; {WAY_OUT}")


@contextmanager
def _beating(store: dist.Store, key: str) -> Iterator[None]:
    """Increment a counter in the store every `BEAT_S` seconds, in a thread, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        try:
            while not ended.wait(BEAT_S):
                store.add(key, 1)
        except RuntimeError:
            pass  # the store is gone; the main thread gets the same error

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
