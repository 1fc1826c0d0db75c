"""Let ranks that are ready to connect wait for ranks that are still reading files or downloading a model.

Before any process group exists, each rank checks the run. For these checks, it downloads and reads the model, the
tokenizer and the first records. On some nodes, this can take longer than `parallel.timeout_s`. A rank that is still
preparing therefore connects, in a thread, to the key-value store that all ranks share, and increments a counter in it.
Ranks that wait restart their time limit at each increment. A rank that never started or has died does not increment the
counter. Once all other ranks are ready, no rank increments the counter anymore, and the ranks that wait for the missing
rank reach their time limit.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from dpo_engine.errors import EngineError, PeerError
from dpo_engine.platform.launcher import world_from_environment
from dpo_engine.platform.parallel import meet
from dpo_engine.platform.peer_watch import UNANSWERED

BEAT_S = 5.0
"""Maximum number of seconds between two increments of the counter."""
POLL_S = (0.005, 0.5)
"""Initial and maximum number of seconds between two reads of the store."""
PREPARING = "preparing"
"""Key of the counter that ranks increment while they are preparing."""

_served: dist.Store | None = None
"""Rank 0's connection to the store. If rank 0 hosts the store, this object is also the server.

It is kept until rank 0 has opened another connection; see :func:`release`.
"""


@contextmanager
def preparing(timeout_s: float) -> Iterator[None]:
    """While this block runs, increment the counter to show that this rank is alive.

    Do nothing if there is only one process, if ``MASTER_ADDR`` is not set, or if the ranks are already connected.

    timeout_s   time limit for connecting to the store, in seconds

    If the store cannot be reached, :func:`~dpo_engine.platform.parallel.open_groups` reports the error later.
    """
    rank, world = world_from_environment()
    if world == 1 or dist.is_initialized() or not os.environ.get("MASTER_ADDR"):
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(rank, timeout_s, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        if rank == 0:  # if the thread is opening the store, wait until it has set `_served`, which keeps the store open
            thread.join()


def _beat(rank: int, timeout_s: float, ended: threading.Event) -> None:
    """Increment the counter until the event is set. If the preparation is short, do not connect to the store at all."""
    global _served
    pause = min(BEAT_S, timeout_s / 4)
    with suppress(EngineError, RuntimeError, ValueError):  # open_groups() raises the same errors later
        if ended.wait(pause):
            return
        store = meet(rank, datetime.timedelta(seconds=timeout_s))
        if rank == 0:
            _served = store
        while not ended.wait(pause):
            store.add(PREPARING, 1)


def release() -> None:
    """Drop rank 0's connection to the store. Call this after :func:`open_groups` has opened another connection."""
    global _served
    _served = None


def await_key(store: dist.Store, key: str, timeout_s: float, progress: Callable[[], None] = lambda: None) -> bytes:
    """Return the value of ``key`` as soon as another rank has set it.

    timeout_s   time limit in seconds; each increment by a rank that is :func:`preparing` restarts the time limit
    progress    function that is called after each increment

    Raises :class:`~dpo_engine.errors.PeerError` after the time limit.
    """
    pause, longest = POLL_S
    beats, since = store.add(PREPARING, 0), time.monotonic()
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, longest)
        now = time.monotonic()
        if (latest := store.add(PREPARING, 0)) != beats:
            beats, since = latest, now
            progress()
        elif now - since > timeout_s:
            raise PeerError(UNANSWERED)
    return store.get(key)
