"""What a measured process reports: time by step, peak memory, and the numbers that show what it computed."""

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
    """One training run in a process of its own.

    side       "engine" or "trl"
    model      directory of a Hugging Face checkpoint
    pairs      Arrow file of token pairs
    steps      pairs of each global batch, in order
    lr         constant learning rate
    dtype      "fp32" or "bf16"
    scratch    an empty directory
    count      count operations (which costs time) rather than measure time
    overrides  engine: keys of its configuration, `a.b=c`
    micro_batch_size, grouped, precomputed   TRL: pairs a micro-batch; pairs of like length share one; the reference
               is scored before training
    onednn     TRL: its matrix products are given to oneDNN, as the engine's are where MKL is slow
    """

    side: str
    model: str
    pairs: str
    steps: list[list[int]]
    lr: float
    dtype: str
    scratch: str = ""
    count: bool = False
    overrides: tuple[str, ...] = ()
    micro_batch_size: int = 1
    grouped: bool = False
    precomputed: bool = False
    onednn: bool = False

    @classmethod
    def read(cls, path: str) -> "Job":
        """The job that a file describes."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Describe it in a file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Measured:
    """What came of a job.

    filling_s       (processor seconds, wall seconds) of scoring the reference once; zeros when it is scored online
    steps_s         the same of every step
    peak_bytes      highest memory above that of a process that has only imported: resident, or the GPU's allocated
    flops           executed operations, with `Job.count`
    largest_tokens  places of the largest micro-batch, padding included
    metrics         of every step: loss, and mean log-probabilities of chosen and rejected responses
    """

    filling_s: tuple[float, float] = (0.0, 0.0)
    steps_s: list[tuple[float, float]] = field(default_factory=list)
    peak_bytes: int = 0
    flops: float = 0.0
    largest_tokens: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)

    def report(self) -> None:
        """Print it as one line, the last of this process."""
        sys.stdout.flush()
        print("\n" + json.dumps(asdict(self)), flush=True)

    @classmethod
    def parse(cls, output: str) -> "Measured":
        """What a process printed."""
        return cls(**json.loads(output.splitlines()[-1]))


METRICS = {"loss": "loss", "logps/chosen": "chosen", "logps/rejected": "rejected"}


def said(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step that both sides report, under one name each."""
    return {name: float(metrics[key]) for key, name in METRICS.items()}


class Meter:
    """Clock and memory of this process; made after everything is imported and before a model is loaded."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._floor = 0 if self._gpu else _status_bytes("VmRSS")
        self._mark = (0.0, 0.0)

    def start(self) -> None:
        """The next lap starts here."""
        self._mark = self._now()

    def lap(self) -> tuple[float, float]:
        """Processor and wall seconds since the last lap ended, or the start."""
        before, self._mark = self._mark, self._now()
        return self._mark[0] - before[0], self._mark[1] - before[1]

    def peak_bytes(self) -> int:
        """See :class:`Measured`."""
        return torch.cuda.max_memory_allocated() if self._gpu else _status_bytes("VmHWM") - self._floor

    def _now(self) -> tuple[float, float]:
        if self._gpu:
            torch.cuda.synchronize()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter()


def _status_bytes(name: str) -> int:
    """A figure of this process. `getrusage` would also count the process that this one was forked from."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
