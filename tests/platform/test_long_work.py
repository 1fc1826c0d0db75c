"""Ranks that wait for another rank's work on files: without a time limit, and not for a rank that is lost."""

import os
import time

import pytest
import torch.distributed as dist

from support.ranks import run_ranks


def order(folder, delay_s):
    """Write a file on the first rank after a delay; every rank returns what it saw."""
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
    """Rank 0 works for 3 s without a sign of life; the limit is 1 s."""
    from dpo_engine.platform import long_work

    long_work.SILENT_S = 1.0
    long_work.BEAT_S = 0.1 if os.environ["RANK"] == "1" else 100.0
    began = time.monotonic()
    try:
        return long_work.first_on_node(dist.group.WORLD, lambda: time.sleep(3))
    except Exception as raised:
        return type(raised).__name__, str(raised), time.monotonic() - began


def test_rank_without_a_sign_of_life_is_lost():
    kind, message, seconds = run_ranks(silent, 2)[1]
    assert kind == "PeerError" and message.startswith("rank 0 has given no sign of life for 1 s; all ranks stop")
    assert seconds < 3
