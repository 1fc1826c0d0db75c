"""The lifeline: TCP connections and a watchdog thread that end this rank if another rank is lost or this rank hangs.

If a rank dies, ranks that wait for it in a collective get an error at once with gloo, but only after several minutes
with NCCL. Ranks that compute or sleep do not notice the loss at all. Therefore every rank keeps a TCP connection to the
first rank. A rank that leaves normally sends a farewell message. If a connection closes without this message, the first
rank tells the other ranks which rank is lost. If the first rank itself is lost, every other rank sees its own
connection close. The operating system closes a process's connections no matter how the process ends.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpo_engine.errors import PeerError
from dpo_engine.exit_code import record
from dpo_engine.platform.launcher import local_rank

FAREWELL = b"F"
LOST = b"L"
RANK = struct.Struct("!I")
TOKEN_BYTES = 16
GRACE_S = 1.5
"""Seconds that the watchdog waits before it ends the process, to let the main thread end with a clearer error."""
WAY_OUT = "all ranks stop. Run the same command again to continue from the newest checkpoint"
UNANSWERED = f"a rank did not answer within parallel.timeout_s: it hangs or never started; {WAY_OUT}"


class Lifeline:
    """This rank's connections, and the thread that watches them.

    rank       number of this rank
    links      sockets by rank: on the first rank, one for every other rank; on each other rank, one for the first rank
    timeout_s  maximum time without progress inside :meth:`working`, in seconds; the watchdog waits `GRACE_S` longer
    """

    def __init__(self, rank: int, links: dict[int, socket.socket], timeout_s: float):
        self.rank = rank
        self.links = links
        self.timeout_s = timeout_s
        self.lost: int | None = None
        self._noticed = threading.Event()
        self._left = threading.Event()
        self._progress: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self, *, orderly: bool) -> None:
        """Stop watching and close the connections.

        orderly   whether to send a farewell message; without it, the other ranks treat this rank as lost
        """
        self._left.set()
        for link in self.links.values():
            try:
                if orderly:
                    link.sendall(FAREWELL)
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other rank has already closed the connection

    def who(self) -> str:
        """Return the name of the lost rank, or "another rank" if the rank is not known within half a second."""
        self._noticed.wait(0.5)
        return "another rank" if self.lost is None else f"rank {self.lost}"

    @contextmanager
    def working(self) -> Iterator[None]:
        """End the process if :meth:`progress` is not called for ``timeout_s`` + `GRACE_S` seconds inside this block."""
        self._progress = time.monotonic()
        try:
            yield
        finally:
            self._progress = None

    def progress(self) -> None:
        """Report that the main thread made progress."""
        if self._progress is not None:
            self._progress = time.monotonic()

    def _watch(self) -> None:
        ready = selectors.DefaultSelector()
        for rank, link in self.links.items():
            ready.register(link, selectors.EVENT_READ, rank)
        while not self._left.is_set():
            for key, _ in ready.select(timeout=0.5):
                lost = self._read(key.fileobj, key.data)
                if lost is not None:
                    self._end(lost)
                ready.unregister(key.fileobj)
            since = self._progress
            if since is not None and time.monotonic() - since > self.timeout_s + GRACE_S:
                self._exit(f"rank {self.rank}: no progress for parallel.timeout_s={self.timeout_s:g} s; {WAY_OUT}")

    def _read(self, link: socket.socket, rank: int) -> int | None:
        """Read a message from ``rank``, the other end of ``link``. Return the lost rank, or ``None`` for a farewell."""
        try:
            said = link.recv(1)
            if said == LOST:
                return RANK.unpack(link.recv(RANK.size, socket.MSG_WAITALL))[0]
        except (OSError, struct.error):
            said = b""
        return None if said == FAREWELL else rank

    def _end(self, lost: int) -> None:
        if self._left.is_set():
            return
        self.lost = lost
        self._noticed.set()
        if self.rank == 0:
            for rank, link in self.links.items():
                try:
                    if rank != lost:
                        link.sendall(LOST + RANK.pack(lost))
                except OSError:
                    pass  # that rank is lost too
        if not self._left.wait(GRACE_S):
            self._exit(lost_rank(f"rank {lost}"))

    def _exit(self, line: str) -> None:
        try:
            if local_rank() <= 1:  # two ranks per node print the line, because one of them may be the lost rank
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        finally:  # exit even if the write fails, for example because the reader of stderr has exited
            os._exit(record(PeerError.exit_code))


def lost_rank(who: str) -> str:
    """Return the error line for a lost rank."""
    return f"{who} died or lost its connection (its own log shows the cause); {WAY_OUT}"


def open_lifeline(rank: int, world: int, address: str, share: Callable[[Any], Any], timeout_s: float) -> Lifeline:
    """Connect all ranks to the first rank.

    address    address of the first rank's machine
    share      function that broadcasts an object from the first rank to all ranks
    timeout_s  time limit for connecting, and the ``timeout_s`` of the :class:`Lifeline`, in seconds

    *Collectives*: one broadcast of an object from the first rank.
    Raises :class:`~dpo_engine.errors.PeerError` if the first rank cannot be reached or a rank does not connect.
    """
    if rank == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world) as server:
            port, token = share((server.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)))
            server.settimeout(timeout_s)
            return Lifeline(rank, _accept(server, world, token), timeout_s)
    port, token = share(None)
    try:
        link = socket.create_connection((address, port), timeout=timeout_s)
        link.sendall(token + RANK.pack(rank))
    except OSError as error:
        raise PeerError(
            f"rank {rank}: cannot connect to the first rank at {address}:{port} ({error}); open the ports above 1024 "
            "between the nodes"
        ) from error
    return Lifeline(rank, {0: _kept_alive(link)}, timeout_s)


def _accept(server: socket.socket, world: int, token: bytes) -> dict[int, socket.socket]:
    links: dict[int, socket.socket] = {}
    while len(links) < world - 1:
        try:
            link, _ = server.accept()
        except OSError as error:
            missing = next(rank for rank in range(1, world) if rank not in links)
            raise PeerError(f"rank {missing}: did not connect to the first rank ({error}); {WAY_OUT}") from error
        try:
            link.settimeout(5)
            said = link.recv(len(token) + RANK.size, socket.MSG_WAITALL)
            if not secrets.compare_digest(said[: len(token)], token):
                raise ConnectionError("wrong token")
            links[RANK.unpack(said[len(token) :])[0]] = _kept_alive(link)
        except (OSError, struct.error):
            link.close()
    return links


def _kept_alive(link: socket.socket) -> socket.socket:
    """Enable TCP keep-alive, so that this rank notices if the other rank's machine fails."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return link
