"""Tests of ranks that wait for another rank's work on files: no time limit, but an error if that rank is lost."""

import contextlib
import io
import os
import re
import time

import pytest
import torch.distributed as dist

from dpo_engine.testing.ranks import run_ranks


def order(folder, delay_s):
    """Write a file on the first rank after a delay. Every rank returns whether it made or found the file."""
    from dpo_engine.platform.long_work import first_on_node

    path = folder / "made"

    def work():
        if path.exists():
            return "found"
        time.sleep(delay_s)
        path.write_text("")
        return "made"

    return [first_on_node(dist.group.WORLD, work), path.unlink() if os.environ["RANK"] == "0" else None][0]


def test_other_ranks_work_after_the_first(tmp_path):
    assert run_ranks(order, 3, folder=tmp_path, delay_s=0.5) == ["made", "found", "found"]


def failing(error, failing_rank):
    from dpo_engine.platform.long_work import first_on_node

    def work():
        if os.environ["RANK"] == failing_rank:
            raise error
        return "done"

    try:
        return first_on_node(dist.group.WORLD, work)
    except Exception as raised:
        return type(raised).__name__, str(raised)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_error_of_one_rank_reaches_all(rank):
    from dpo_engine.errors import DataError

    assert (
        run_ranks(failing, 2, error=DataError("d.jsonl:1: bad"), failing_rank=rank)
        == [("DataError", "d.jsonl:1: bad")] * 2
    )


def test_bug_on_one_rank_reaches_all():
    found = run_ranks(failing, 2, error=ZeroDivisionError("a bug"), failing_rank="0")
    assert found == [("ZeroDivisionError", "a bug"), ("PeerError", "rank 0 died: ZeroDivisionError: a bug")]


def silent():
    """Let rank 0 work for 3 s without a heartbeat, although the limit is 1 s.

    Returns the result, or the error and the seconds until it was raised.
    """
    from dpo_engine.platform import long_work

    long_work.SILENT_S = 1.0
    long_work.BEAT_S = 0.1 if os.environ["RANK"] == "1" else 100.0
    began = time.monotonic()
    try:
        return long_work.first_on_node(dist.group.WORLD, lambda: time.sleep(3))
    except Exception as raised:
        return type(raised).__name__, str(raised), time.monotonic() - began


def test_rank_without_a_heartbeat_is_lost():
    kind, message, seconds = run_ranks(silent, 2)[1]
    assert kind == "PeerError" and message.startswith("rank 0 has sent no heartbeat for 1 s; all ranks stop")
    assert seconds < 3


def counted(seconds):
    """Let rank 1 simulate reading 3 MB, at `seconds` seconds per MB, while rank 0 waits. Return the printed lines."""
    from dpo_engine.platform import long_work, progress_line

    long_work.BEAT_S, long_work.FIRST_S = 0.05, 0.4
    progress_line.FIRST_S, progress_line.EVERY_S = 0.4, 0.3
    meter = long_work.Meter("reading /d", 3_000_000 if os.environ["RANK"] == "1" else 0)

    def work():
        while meter.done < meter.total:
            time.sleep(seconds)
            meter.add(1_000_000)

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        for _ in range(2):
            long_work.without_time_limit(dist.group.WORLD, work, meter)
    return text.getvalue().splitlines()


def test_first_rank_prints_rate_and_time_left_during_a_long_wait():
    lines, others = run_ranks(counted, 2, seconds=0.45)
    assert others == [] and len(lines) >= 2
    found = [re.fullmatch(r"reading /d: (?:33|66)% of 3\.0 MB, (\d\.\d) MB/s, 0:00:\d\d left", line) for line in lines]
    assert all(found[1:]), lines
    assert found[0] or lines[0].startswith("reading /d: waiting for 1 of 2 ranks, 0:00:0"), lines
    assert all(float(one[1]) <= 2.3 for one in found if one)


def test_progress_text():
    from dpo_engine.platform.long_work import _progress

    assert _progress(20, 4_000_000_000, 10_000_000_000, 2, 8) == "40% of 10.0 GB, 200.0 MB/s, 0:00:30 left"
    assert _progress(20, 0, 0, 1, 2) == "waiting for 1 of 2 ranks, 0:00:20 so far"
    full = "100% of 10.0 MB, waiting for 1 of 2 ranks, 0:01:20 so far"
    assert _progress(80, 10_000_000, 10_000_000, 1, 2) == full


def test_short_wait_prints_nothing():
    assert run_ranks(counted, 2, seconds=0.05) == [[], []]


def ended():
    """Call `without_time_limit` three times. Return for each call whether the store still has the call's key."""
    from dpo_engine.platform import long_work

    for _ in range(3):
        long_work.without_time_limit(dist.group.WORLD, lambda: None)
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    return [store.check([f"long_work/{call}/finished"]) for call in (1, 2, 3)]


def test_keys_of_earlier_calls_are_removed():
    assert run_ranks(ended, 2)[0] == [False, False, True]


def first(work_of_first):
    from dpo_engine.platform.long_work import from_first

    return from_first(dist.group.WORLD, lambda: os.environ["RANK"] if work_of_first else None)


def test_result_of_the_first_rank_reaches_all():
    assert run_ranks(first, 2, work_of_first=True) == ["0", "0"]
