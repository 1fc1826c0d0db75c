"""Read the null GPU's counters from Python, and attribute the host's waits to lines of source code."""

import ctypes
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUILT = Path(__file__).parent / "build" / "libnullgpu.so"
COUNTERS = (
    "launches", "products", "fp8_products", "cudnn_calls", "cudnn_plans", "collectives", "communicators",
    "stream_waits", "device_waits", "event_waits", "blocking_copies", "pageable_copies", "copies", "allocations",
    "graphs", "captured", "stray",
)  # fmt: skip
WAITS = ("stream_waits", "device_waits", "event_waits", "blocking_copies")
"""Names of the counters that count the host's waits for the device."""
ATTENTION = ("flash", "fmha", "triton:_forward", "triton:_backward_query", "triton:_backward_key")
"""A kernel is an attention kernel if its name contains one of these strings."""
SOURCES = ("/dpo_engine/", "/dpo_kernels/", "/megatron/", "/transformer_engine/")


class Card:
    """The preloaded library of the null GPU. It never resets its counters, so callers subtract an earlier reading."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(BUILT))  # opens no second copy: the preloaded library has this path
        self._library.nullgpu_counter.restype = ctypes.c_long

    def counts(self) -> Counter[str]:
        """Return the number of events so far for each name in COUNTERS."""
        return Counter({name: self._library.nullgpu_counter(name.encode()) for name in COUNTERS})

    def details(self) -> dict[str, Counter[str]]:
        """Return a counter of launches for each kernel, and a counter of NCCL calls for each kind of call.

        The counters have the keys ``kernel`` and ``collective``. NCCL calls are of one kind if they have the same
        operation, size in bytes, and number of ranks.
        """
        found: dict[str, Counter[str]] = {"kernel": Counter(), "collective": Counter()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "details"
            self._library.nullgpu_write(os.fsencode(file))
            for line in file.read_text().splitlines():
                kind, calls, name = line.split("\t", 2)
                found[kind][name] += int(calls)
        return found

    def announce_group(self, rank: int, ranks: int) -> None:
        """Tell the null GPU about the communicator that the next call of ncclCommSplit creates.

        rank    this process's rank in the communicator
        ranks   number of ranks in the communicator
        """
        self._library.nullgpu_announce_group(rank, ranks)


def waits(counts: Counter[str]) -> int:
    """Return the number of times that the host waited for the device."""
    return sum(counts[name] for name in WAITS)


def attention_launches(kernels: Counter[str]) -> int:
    """Return the number of launches of attention kernels."""
    return sum(calls for name, calls in kernels.items() if any(part in name for part in ATTENTION))


@contextmanager
def waits_by_line() -> Iterator[Counter[str]]:
    """Count torch's warnings about waits inside the block, by the place of each wait in the source code.

    The place consists of the three innermost stack frames whose file paths contain one of the strings in SOURCES.
    """
    import torch

    places: Counter[str] = Counter()

    def note(message: Warning, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in SOURCES)]
        named = [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames[-3:])]
        places[" < ".join(named) or "outside of the engine"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # catch_warnings restores the original function
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _short(filename: str) -> str:
    for part in SOURCES:
        if part in filename:
            return part.strip("/") + "/" + filename.split(part, 1)[1]
    return filename
