"""Measure one training process: time per step, peak memory and, to compare results, the metrics of each step."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """One training run in its own process.

    side       "engine" or "trl"
    model      directory of a Hugging Face checkpoint
    pairs      Arrow file of token pairs
    steps      pair indices of each global batch, in order
    lr         constant learning rate
    dtype      "fp32" or "bf16"
    scratch    an empty directory
    count      whether to count operations; the times are then not meaningful
    adapter    directory of a PEFT adapter that is trained instead of the weights; the reference is the model with the
               initial adapter; empty: all weights are trained
    overrides  engine: config overrides, `a.b=c`
    digest     engine: whether to hash the weights after the last step
    micro_batch_size  TRL: number of pairs per micro-batch
    grouped           TRL: whether to group pairs of similar length
    precomputed       TRL: whether to score all pairs with the reference before training
    onednn            TRL: whether to use oneDNN for matrix products, as the engine does on processors where MKL is slow
    """

    side: str
    model: str
    pairs: str
    steps: list[list[int]]
    lr: float
    dtype: str
    scratch: str = ""
    count: bool = False
    adapter: str = ""
    overrides: tuple[str, ...] = ()
    digest: bool = False
    micro_batch_size: int = 1
    grouped: bool = False
    precomputed: bool = False
    onednn: bool = False

    @classmethod
    def read(cls, path: str) -> "Job":
        """Read a job from a file."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the job to a file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Measured:
    """Measurements of a job.

    filling_s       (processor seconds, wall seconds) to score all pairs with the reference in advance; zeros if each
                    step scores its own pairs
    steps_s         (processor seconds, wall seconds) of every step
    peak_bytes      peak resident memory minus the resident memory after the imports; on a GPU, peak memory allocated
                    by torch
    reserved_bytes  engine on a GPU: peak memory reserved by torch
    outside_bytes   engine on a GPU: memory in use on the device after the last step, minus the memory reserved by torch
    flops           number of executed operations, if `Job.count` is set
    largest_tokens  number of tokens in the largest micro-batch, including padding
    metrics         metrics of every step: loss, and mean log-probabilities of chosen and rejected responses
    digest          SHA-256 of the weights after the last step, if `Job.digest` is set
    """

    filling_s: tuple[float, float] = (0.0, 0.0)
    steps_s: list[tuple[float, float]] = field(default_factory=list)
    peak_bytes: int = 0
    reserved_bytes: int = 0
    outside_bytes: int = 0
    flops: float = 0.0
    largest_tokens: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    digest: str = ""

    def report(self) -> None:
        """Print the measurements on one line. This line must be the last output of the process."""
        sys.stdout.flush()
        print("\n" + json.dumps(asdict(self)), flush=True)

    @classmethod
    def parse(cls, output: str) -> "Measured":
        """Parse the output of a process."""
        return cls(**json.loads(output.splitlines()[-1]))


METRICS = {"loss": "loss", "logps/chosen": "chosen", "logps/rejected": "rejected"}


def said(metrics: dict[str, Any]) -> dict[str, float]:
    """Return those metrics of a step that the engine and TRL both report, under common names."""
    return {name: float(metrics[key]) for key, name in METRICS.items()}


class Meter:
    """Meter of time and memory of this process. Create it after all imports and before loading a model."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._floor = 0 if self._gpu else _status_bytes("VmRSS")
        self._mark = (0.0, 0.0)

    def start(self) -> None:
        """Start the next lap."""
        self._mark = self._now()

    def lap(self) -> tuple[float, float]:
        """Return the processor and wall seconds since the end of the last lap, or since `start`.

        The processor seconds include those of child processes that have ended.
        """
        before, self._mark = self._mark, self._now()
        return self._mark[0] - before[0], self._mark[1] - before[1]

    def peak_bytes(self) -> int:
        """Return the peak memory, as defined in :class:`Measured`."""
        return torch.cuda.max_memory_allocated() if self._gpu else _status_bytes("VmHWM") - self._floor

    def memory(self, measured: Measured) -> None:
        """Store the memory of this process in `measured`, as defined in :class:`Measured`."""
        measured.peak_bytes = self.peak_bytes()
        if self._gpu:
            free, total = torch.cuda.mem_get_info()
            measured.reserved_bytes = torch.cuda.max_memory_reserved()
            measured.outside_bytes = total - free - torch.cuda.memory_reserved()

    def _now(self) -> tuple[float, float]:
        if self._gpu:
            torch.cuda.synchronize()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter()


def _status_bytes(name: str) -> int:
    """Return a memory value of this process in bytes.

    The value is read from `/proc`, because the peak of `getrusage` includes the peak of the parent process.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
