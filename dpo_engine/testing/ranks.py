"""Run a function on N ranks on this machine, over gloo.

The ranks are forked from a process that has imported everything.
"""

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(fn: Callable[..., Any], world_size: int, *, timeout_s: float = 240, **kwargs: Any) -> list[Any]:
    """Call ``fn(**kwargs)`` on every rank; return the results as a list, indexed by rank.

    Forking a rank takes 0.1 s, because this process has already imported Megatron; spawning one would take 15 s. The
    ranks find each other through a file.

    Raises ``AssertionError`` with the traceback of the first rank that fails. If a rank is killed or does not return
    within ``timeout_s`` seconds, the ``AssertionError`` names that rank.
    Raises ``RuntimeError`` if this process can use a CUDA device, because CUDA does not work after a fork.
    """
    import dpo_engine.verbs.evaluate
    import dpo_engine.verbs.train  # noqa: F401  also imports all other modules, before the fork
    from dpo_engine.platform.device import gpu_present, open_platform

    if gpu_present():
        raise RuntimeError(
            "this process can use a GPU, but CUDA does not work after a fork; set CUDA_VISIBLE_DEVICES to an empty "
            "string before Python starts"
        )
    open_platform(deterministic=True)
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, world_size, folder, fn, kwargs) for rank in range(world_size)]
        failed = _wait(children, timeout_s)
        results = []
        for rank in [failed] if failed is not None else range(world_size):
            path = f"{folder}/{rank}.result"
            if not os.path.exists(path):
                raise AssertionError(f"rank {rank} left no result: it was killed, or ran for more than {timeout_s} s")
            with open(path, "rb") as file:
                ok, value = pickle.load(file)
            assert ok, f"rank {rank} of {world_size} failed:\n{value}"
            results.append(value)
        return results


def _fork(rank: int, world_size: int, folder: str, fn: Callable[..., Any], kwargs: dict[str, Any]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # garbage collections would write to all pages that are shared with the parent, and so copy them
    status = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
        outcome = (True, fn(**kwargs))
        status = 0
    except BaseException:
        outcome = (False, traceback.format_exc())
    with open(f"{folder}/{rank}.part", "wb") as file:
        pickle.dump(outcome, file)
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.result")
    os._exit(status)


def _wait(children: list[int], timeout_s: float) -> int | None:
    """Wait for all children, and return None if all succeed.

    If a child fails, return its rank; after the timeout, return the first rank that still runs. In both cases, kill all
    children that still run.
    """
    left, deadline = dict(enumerate(children)), time.monotonic() + timeout_s
    failed = None
    while left and failed is None:
        for rank, pid in list(left.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del left[rank]
                if status:
                    failed = rank
        if left and failed is None:
            if time.monotonic() > deadline:
                failed = next(iter(left))
            time.sleep(0.005)
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return failed
