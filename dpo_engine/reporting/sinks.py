"""Write metrics and messages to sinks: the console, `metrics.jsonl`, and the enabled experiment trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_engine.atomic_files import naming, write_whole
from dpo_engine.config.run import Config
from dpo_engine.errors import printable
from dpo_engine.faults import reach
from dpo_engine.reporting.console import open_console
from dpo_engine.reporting.contract import ConsoleSink, Sink
from dpo_engine.reporting.trackers import MlflowSink, TensorBoardSink, WandbSink


class Sinks:
    """All sinks of a run. On ranks other than the writer there are no sinks, and all methods do nothing."""

    def __init__(self, console: ConsoleSink | None = None, files: tuple[Sink, ...] = ()):
        self._console = console
        self._sinks = (console, *files) if console else files

    def log(self, step: int, metrics: Mapping[str, float], *, prefix: str = "") -> None:
        """Record the metrics of optimizer step `step`, with `prefix` (such as `eval/`) before each name."""
        for sink in self._sinks:
            sink.write(step, metrics, prefix)

    def say(self, text: str) -> None:
        """Print a message, above the progress bar if there is one."""
        if self._console:
            self._console.say("\n".join(printable(line) for line in text.split("\n")))

    def close(self) -> None:
        """Close all sinks. Safe to call twice."""
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close()


def open_sinks(config: Config, *, total_steps: int, writer: bool, start_step: int = 0) -> Sinks:
    """Open the sinks that `config.logging` enables. Ranks other than the writer get none.

    total_steps  number of optimizer steps in the whole run
    writer       whether this rank writes metrics and messages
    start_step   number of steps after which the run resumes; lines about later steps are removed from `metrics.jsonl`;
                 0: all lines are removed

    Raises `ConfigError` if W&B or MLflow is enabled and cannot be opened.
    """
    if not writer:
        return Sinks()
    logging, directory = config.logging, Path(config.train.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    files: list[Sink] = [JsonlSink(metrics_file(config), start_step)]
    if logging.tensorboard:
        files.append(TensorBoardSink(directory / "tensorboard", start_step))
    if logging.wandb:
        files.append(WandbSink(logging.wandb, config, directory, start_step))
    if logging.mlflow:
        files.append(MlflowSink(logging.mlflow, config, directory, start_step))
    return Sinks(open_console(logging.progress, total_steps, start_step), tuple(files))


def metrics_file(config: Config) -> Path:
    """Return the path of a run's metrics file."""
    return Path(config.train.output_dir) / "metrics.jsonl"


class JsonlSink:
    """Write one JSON object per line: `{"step": 3, "loss": 0.69, ...}`. A non-finite value is written as null."""

    def __init__(self, path: Path, start_step: int):
        kept = list(_lines_until(path, start_step)) if path.exists() else []
        # If a finished run is started again, it evaluates again. Do not write a second line about that evaluation.
        self._known = {tuple(json.loads(line)) for line in kept if json.loads(line)["step"] == start_step}
        self._start_step = start_step
        write_whole(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        reach("log", self._file.name)
        line: dict[str, float | None] = {"step": step}
        line.update((prefix + name, value if math.isfinite(value) else None) for name, value in values.items())
        if step == self._start_step and tuple(line) in self._known:
            return
        with naming(self._file.name):
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        with suppress(OSError):  # the file is line-buffered, so write() has already raised any error
            self._file.close()


def _lines_until(path: Path, start_step: float) -> list[str]:
    """Return the complete lines about steps up to `start_step`, or no lines if the run starts from step 0."""
    kept = []
    if start_step == 0:
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the incomplete last line of a process that was killed
        if step <= start_step and line.endswith("\n"):
            kept.append(line)
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics file; an empty list if the file does not exist."""
    return [json.loads(line) for line in _lines_until(path, math.inf)] if path.exists() else []
