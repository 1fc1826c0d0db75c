"""Apply a function to many tasks in worker processes, and return the results in the order of the tasks.

The processes are started as new Python interpreters instead of forks, because forking a process that has threads (of
gloo, NCCL or the tokenizer) can deadlock. The new interpreters do not import the main script, so scripts need no
`if __name__ == "__main__"`.

The process that starts the workers has a socket to every worker, and no third process has a copy of the socket. When
the starting process ends, even by SIGKILL, the operating system closes the socket, and a thread in the worker then ends
the worker at once. Workers ignore SIGINT, SIGTERM and SIGUSR1, which a terminal or a scheduler may send to all
processes of a job. Only the starting process responds to these signals.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from dpo_engine.errors import ConfigError, printable, shorten

AHEAD = 4
"""Maximum number of tasks per worker that have been sent, but whose results have not been returned yet."""
QUEUED = 2
"""Maximum number of tasks that a worker has received but not finished."""
MOST = 32
"""Maximum default number of workers. More workers would only wait for the process that writes the results."""
WORTH_BYTES = 8 * 2**20
"""Minimum number of bytes to tokenize per worker. The imports of a worker take as long as tokenizing 4 MiB. With 8 MiB,
imports therefore take a third of a worker's time. With fewer bytes, they would take a larger share."""
QUOTA = "/sys/fs/cgroup/cpu.max"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
COMMAND = "import sys; sys.path[:] = sys.argv[2:]; from dpo_engine.data.workers import serve; serve(int(sys.argv[1]))"


class Unsuited(Exception):
    """Worker processes cannot be started, or the function cannot be sent to them. The message is the reason."""


def default_count(size: int) -> int:
    """Return the number of workers for files of `size` bytes: one per core, at most `MOST`, fewer for small files."""
    return max(1, min(cores(), MOST, size // WORTH_BYTES))


def cores() -> int:
    """Return the number of cores that the CPU affinity and the CPU quota of the container allow this process to use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(QUOTA) as file:
            quota, period = file.read().split()
        return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return count


class Workers:
    """`count` processes that call a function. Use as a context manager; the processes end with the ``with`` block.

    Raises :class:`Unsuited` if a process cannot be started. `load` and `map` raise :class:`ConfigError` if a process
    dies.
    """

    def __init__(self, count: int):
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(_Worker(count))
        except BaseException:
            self.close()
            raise

    def load(self, function: Callable[[Any], Any]) -> None:
        """Send all workers the function that the next :meth:`map` calls.

        Raises :class:`Unsuited` if the function cannot be pickled, or if a worker cannot load the function.
        """
        try:
            packed = pickle.dumps((True, function))
        except Exception as error:  # pickling an object can raise any exception
            raise Unsuited(_reason(error)) from error
        for worker in self._workers:
            worker.send(packed)
        answers = [worker.receive() for worker in self._workers]
        for fits, error in answers:
            if not fits:
                raise Unsuited(_reason(error))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of every task, in order. At most `AHEAD` tasks per worker are in memory.

        An exception that the function or `tasks` raises is raised in place of the result.
        """
        ready: dict[int, tuple[bool, Any]] = {}
        coming, sent, used = iter(tasks), 0, 0
        failure: Exception | None = None
        more = True
        while more or used < sent:
            while more and sent - used < AHEAD * len(self._workers):
                worker = min(self._workers, key=lambda one: len(one.numbers))
                if len(worker.numbers) == QUEUED:
                    break
                try:
                    task = next(coming)
                except StopIteration:
                    more = False
                except Exception as error:
                    more, failure = False, error
                else:
                    worker.numbers.append(sent)
                    worker.send(pickle.dumps((False, task)))
                    sent += 1
            if used in ready:
                fine, result = ready.pop(used)
                used += 1
                if not fine:
                    raise result
                yield result
                continue
            if used < sent:
                busy = {worker.connection: worker for worker in self._workers if worker.numbers}
                for connection in wait(list(busy)):
                    worker = busy[connection]
                    answer = worker.receive()
                    ready[worker.numbers.pop(0)] = answer
        if failure:
            raise failure

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()


class _Worker:
    """Handle of one worker process, in the process that started it.

    numbers  indices of the tasks that the worker has received but not finished, oldest first
    """

    def __init__(self, count: int):
        ours, theirs = socket.socketpair()
        with theirs:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # the new process inherits the mask
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", COMMAND, str(theirs.fileno()), *sys.path],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **ENVIRONMENT},
                )
            except OSError as error:
                ours.close()
                raise Unsuited(_reason(error)) from error
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.connection = Connection(ours.detach())
        self.numbers: list[int] = []
        self._count = count

    def send(self, packed: bytes) -> None:
        """Send a pickled object. The call never blocks for long, because a thread in the worker reads continuously."""
        try:
            self.connection.send_bytes(packed)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> tuple[bool, Any]:
        """Wait for the worker's next answer. The worker sends one answer for each function and one for each task.

        Returns  (True, result) if the worker loaded the function or completed the task, or (False, exception) if it
                 failed. The result of loading a function is None
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    def _lost(self) -> ConfigError:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ConfigError(
            f"data.workers={self._count}: a worker process {how}; if the machine ran out of memory, set data.workers "
            "to a smaller number"
        )


def serve(handle: int) -> None:
    """Run a worker process: receive functions and tasks over the socket `handle`, and send the results."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    connection = Connection(handle)
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    function = None
    while True:
        packed = received.get()
        try:
            loads, content = pickle.loads(packed)
            if loads:
                function = content
                gc.freeze()  # imported objects stay alive: do not scan them in every garbage collection
            answer = (True, None if loads else function(content))
        except Exception as error:
            answer = (False, _sendable(error))
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)  # the process that started this worker has ended


def _receive(connection: Connection, received: queue.SimpleQueue[bytes]) -> None:
    """Receive functions and tasks, and end this process when the process that started it has ended."""
    try:
        while True:
            received.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _sendable(error: Exception) -> Exception:
    """Return the exception, or a `RuntimeError` with the exception's type and text if the exception cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _reason(error: Exception) -> str:
    return shorten(printable(f"{type(error).__name__}: {error}"), 120)
