"""Tests of tokenization that takes longer than `parallel.timeout_s`, and of signals and deaths during tokenization."""

import os
import signal
import time
from pathlib import Path

import pytest

from support.jobs import run_job

TIMEOUT_S = 2
WITHIN_S = 5.0


def takes(seconds, marker):
    """Return a ``before`` hook: for each chunk of records, rank 0 creates `marker` and then sleeps for `seconds`."""

    def before():
        from dpo_engine.data import encode_block

        encode = encode_block.encode_pairs

        def slow(*arguments, **options):
            if os.environ["RANK"] == "0":
                Path(marker).write_text("")
                time.sleep(seconds)
            return encode(*arguments, **options)

        encode_block.encode_pairs = slow

    return before


def once(marker, act):
    """Return a ``during`` hook of ``run_job``. The hook waits until the file `marker` exists, and half a second more.

    By then, the other ranks wait for rank 0. The hook then calls `act` with the process ids.
    """

    def during(pids):
        deadline = time.monotonic() + 60
        while not Path(marker).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        act(pids)

    return during


@pytest.fixture
def hasty(run_yaml):
    return ["train", str(run_yaml(parallel={"timeout_s": TIMEOUT_S})), "train.max_steps=1", "optim.warmup_steps=0"]


@pytest.mark.slow
def test_tokenizing_may_take_longer_than_the_timeout(hasty, tmp_path):
    """The timeout is 2 s. Tokenizing takes 3 s for the training pairs, and 3 s more for the held-out pairs."""
    done = run_job(hasty, 2, tmp_path / "log", before=takes(3, tmp_path / "marker"))
    assert done.codes == [0, 0], done.said
    assert min(done.seconds) > 6


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_death_is_noticed_while_the_others_wait(rank, hasty, tmp_path):
    marker = tmp_path / "marker"
    kill = once(marker, lambda pids: os.kill(pids[rank], signal.SIGKILL))
    done = run_job(hasty, 2, tmp_path / "log", before=takes(60, marker), during=kill)
    assert done.codes[rank] == -signal.SIGKILL and done.codes[1 - rank] == 6 and not done.survivors
    assert done.seconds[1 - rank] - done.seconds[rank] < WITHIN_S
    assert f"rank {rank} died or lost its connection" in done.errors[1 - rank]


@pytest.mark.slow
def test_signal_stops_tokenizing(hasty, tmp_path):
    marker = tmp_path / "marker"
    terminate = once(marker, lambda pids: [os.kill(pid, signal.SIGTERM) for pid in pids])
    done = run_job(hasty, 2, tmp_path / "log", before=takes(2, marker), during=terminate)
    assert done.codes == [75, 75], done.said
    assert done.said == "SIGTERM: stopped during tokenization; run the same command to start again\n"
    assert max(done.seconds) < 60 and not list((tmp_path / "run/cache").glob("*"))
