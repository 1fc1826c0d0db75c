"""Format measurements as a table of rates and ratios, and check that the engine and TRL computed the same results."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Job, Measured

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest allowed difference between the values of a metric in the same step of two runs.

For values above 1 or below -1, the difference is divided by the absolute value in the first run."""

COLUMNS = ("run", "runs", "pairs per s", "over TRL", "peak MB", "of TRL", "GFLOP/pair", "over bound", "micro-batch")
PACKAGES = ("megatron-core", "transformers", "trl", "peft")


class Disagreement(Exception):
    """Two runs computed different results, so their speeds cannot be compared."""


@dataclass
class Setting:
    """One way to train on a data set, with its measurements.

    bound    minimum number of operations to train on all pairs in all epochs. A stored reference scores each pair once;
             any other reference scores each pair once per epoch
    runs     one run per round, starting with the first round
    counted  the run that counted operations, or None
    """

    name: str
    job: Job
    bound: float
    runs: list[Measured] = field(default_factory=list)
    counted: Measured | None = None


def rate(run: Measured, *, pairs: int, warmup: int, gpu: bool) -> float:
    """Return the number of pairs per second of processor time or, on a GPU, of wall time.

    If the run scores pairs with the reference in advance, the time includes this scoring.

    pairs   number of pairs in the steps after the first `warmup` steps
    """
    clock = 1 if gpu else 0
    return pairs / (run.filling_s[clock] + sum(step[clock] for step in run.steps_s[warmup:]))


def ratio(setting: Setting, other: Setting, *, pairs: int, warmup: int, gpu: bool) -> float:
    """Return the ratio of the rates of two settings: the median over the rounds in which both settings were run."""
    rates = [[rate(run, pairs=pairs, warmup=warmup, gpu=gpu) for run in one.runs] for one in (setting, other)]
    return median(own / theirs for own, theirs in zip(*rates, strict=False))


def check_agreement(settings: Sequence[Setting], tolerance: float) -> float:
    """Compare the metrics of every step in every run with those of the first run, and return the largest difference.

    For metrics above 1 or below -1, the difference is divided by the metric's absolute value. Raises
    :class:`Disagreement` if a difference exceeds `tolerance`.
    """
    first, largest = settings[0].runs[0].metrics, 0.0
    for setting in settings:
        for run in setting.runs:
            for step, (expected, found) in enumerate(zip(first, run.metrics, strict=True), 1):
                for name, value in expected.items():
                    apart = abs(found[name] - value) / max(1.0, abs(value))
                    largest = max(largest, apart)
                    if not apart <= tolerance:
                        raise Disagreement(
                            f"step {step}: {name} is {found[name]:.6f} with {setting.name} and {value:.6f} with "
                            f"{settings[0].name}; the results differ, so speeds are not compared"
                        )
    return largest


def table(settings: Sequence[Setting], best: Setting | None, *, pairs: int, warmup: int, gpu: bool) -> str:
    """Return a Markdown table with one line per setting.

    Rates and memory are medians over the runs of a setting. For a ratio of rates, a ratio is computed in each round,
    and the table shows the median over the rounds.
    """

    def rates(setting: Setting) -> list[float]:
        return [rate(run, pairs=pairs, warmup=warmup, gpu=gpu) for run in setting.runs]

    def peak(setting: Setting) -> float:
        return median(run.peak_bytes for run in setting.runs)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for setting in settings:
        cells = [
            setting.name,
            str(len(setting.runs)),
            f"{median(rates(setting)):.2f}",
            "",
            f"{peak(setting) / 1e6:.0f}",
        ]
        if best:
            cells[3] = f"{ratio(setting, best, pairs=pairs, warmup=warmup, gpu=gpu):.2f}"
        cells.append(f"{peak(setting) / peak(best):.2f}" if best else "")
        if setting.counted:
            flops = setting.counted.flops
            cells += [f"{flops / pairs / 1e9:.2f}", f"{flops / setting.bound:.3f}"]
        else:
            cells += ["", ""]
        cells.append(f"{setting.runs[0].largest_tokens:,}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Describe the machine: processor, GPU, versions and commit."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in described if line.startswith("model name")]
    root = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "processor": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,  # also names the build (such as +cpu), which the package metadata may omit
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() or None,
    }


def publish(lines: Sequence[Sequence[str]], about: str, save: str | None) -> None:
    """Print a table with a description of the machine, and write it to results/`save`.md if `save` is given.

    lines  cells of the table; the first line is the header
    about  settings that all lines share
    """
    said = ", ".join(f"{name} {value}" for name, value in machine().items() if value)
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    text = "\n".join([said, "", about, "", *("| " + " | ".join(line) + " |" for line in ruled), ""])
    print(text)
    if save:
        (Path(__file__).parent / "results" / f"{save}.md").write_text(f"## {save}\n\n{text}", encoding="utf-8")


def as_json(settings: Sequence[Setting]) -> list[Mapping[str, Any]]:
    """Return all measurements."""
    return [
        {
            "name": setting.name,
            "bound": setting.bound,
            "runs": [asdict(run) for run in setting.runs],
            "counted": setting.counted and asdict(setting.counted),
        }
        for setting in settings
    ]
