"""Tests of connections between ranks: foreign clients, lost or hanging ranks, and errors caused by a lost rank."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from dpo_engine.errors import CheckpointError, PeerError
from dpo_engine.platform.parallel import communication_error
from dpo_engine.platform.peer_watch import Lifeline, open_lifeline

TOKEN = b"t" * 16


def linked(world, first=lambda port: None):
    """Connect `world` ranks within this process, and return their lifelines by rank.

    Each rank except rank 0 calls `first` with the port of rank 0 before it connects to this port.
    """
    box, known, ends = [], threading.Event(), {}

    def share_first(value):
        box.append((value[0], TOKEN))
        known.set()
        return box[0]

    def share_others(_):
        known.wait()
        first(box[0][0])
        return box[0]

    def connect(rank):
        share = share_first if rank == 0 else share_others
        ends[rank] = open_lifeline(rank, world, "127.0.0.1", share, 5.0)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(world)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return ends


def test_unexpected_exit_is_reported_to_all_ranks(monkeypatch):
    exits = []
    monkeypatch.setattr(Lifeline, "_exit", lambda self, line: exits.append((self.rank, line)))
    monkeypatch.setattr("dpo_engine.platform.peer_watch.GRACE_S", 0.1)
    ends = linked(4)
    ends[3].leave(orderly=True)
    time.sleep(0.3)
    assert exits == []
    ends[2].leave(orderly=False)
    assert ends[1].who() == "rank 2" and ends[0].who() == "rank 2"
    time.sleep(0.5)
    assert sorted(rank for rank, _ in exits) == [0, 1]
    expected = "rank 2 died or lost its connection (its own log shows the cause); all ranks stop. "
    assert all(line.startswith(expected) for _, line in exits)
    [ends[rank].leave(orderly=False) for rank in (0, 1)]


def test_rank_exits_even_if_nobody_reads_its_stderr():
    program = "import os, time; from dpo_engine.platform.peer_watch import Lifeline; Lifeline(0, {}, 1)._exit('lost')"
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], stderr=write, env={**os.environ, "LOCAL_RANK": "0"})
    os.close(read)
    os.close(write)
    assert process.wait() == 6


def test_foreign_connections_are_rejected():
    def strangers(port):
        for said in (b"", b"x" * 20, b"GET / HTTP/1.0\r\n\r\n" * 3):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)

    ends = linked(2, strangers)
    assert set(ends[0].links) == {1}
    [end.leave(orderly=True) for end in ends.values()]


def test_unreachable_first_rank_is_an_error():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(PeerError, match=f"rank 1: cannot connect to the first rank at 127.0.0.1:{port} ") as error:
        open_lifeline(1, 2, "127.0.0.1", lambda value: (port, TOKEN), 1.0)
    assert str(error.value).endswith("open the ports above 1024 between the nodes")


def test_rank_that_never_connects_is_an_error():
    with pytest.raises(PeerError, match="rank 1: did not connect to the first rank "):
        open_lifeline(0, 2, "127.0.0.1", lambda value: value, 0.2)


def test_no_progress_ends_the_process(monkeypatch):
    exits = []
    monkeypatch.setattr(Lifeline, "_exit", lambda self, line: (exits.append(line), self._left.set()))
    monkeypatch.setattr("dpo_engine.platform.peer_watch.GRACE_S", 0.1)
    alone = Lifeline(0, {}, 0.5)
    time.sleep(1.5)
    with alone.working():
        for _ in range(4):
            time.sleep(0.3)
            alone.progress()
        assert exits == []
        time.sleep(1.5)
    assert exits[0].startswith("rank 0: no progress for parallel.timeout_s=0.5 s; all ranks stop")


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"), "died or lost"),
        (RuntimeError("[/x/gloo/unbound_buffer.cc:72] Timed out waiting 5000ms for recv"), "did not answer within"),
        (dist.DistNetworkError("The client socket has timed out after 5000ms"), "did not answer within"),
        (dist.DistBackendError("NCCL error in: x.cpp:3, remote process exited"), "died or lost"),
        (ConnectionResetError("reset"), "died or lost"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("gloo"), None),
        (CheckpointError("Connection closed"), None),
    ],
)
def test_errors_that_mean_a_lost_rank(error, expected):
    found = communication_error(error)
    assert (found is None) if expected is None else (expected in str(found) and found.exit_code == 6)
