"""Tests of a rank that waits for a key in the store that all ranks share.

Each sign of life from a rank that is still preparing restarts the time limit.
"""

import threading
import time

import pytest
import torch.distributed as dist

from dpo_engine.errors import PeerError
from dpo_engine.platform.arrival import PREPARING, await_key


def test_wait_counts_from_the_latest_sign_of_life():
    store, beats = dist.HashStore(), []

    def prepare():
        for _ in range(8):
            time.sleep(0.1)
            store.add(PREPARING, 1)
        store.set("key", "value")

    thread = threading.Thread(target=prepare)
    thread.start()
    assert await_key(store, "key", 0.5, lambda: beats.append(1)) == b"value"
    thread.join()
    assert beats


def test_rank_that_never_starts_is_awaited_until_the_time_limit():
    began = time.monotonic()
    with pytest.raises(PeerError, match=r"a rank did not answer within parallel\.timeout_s: it hangs or never started"):
        await_key(dist.HashStore(), "key", 0.2)
    assert 0.2 <= time.monotonic() - began < 2
