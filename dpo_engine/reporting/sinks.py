"""Write metrics and messages to sinks: the console, `log.txt`, `metrics.jsonl`, and the enabled trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dpo_engine.atomic_files import naming, write_whole
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, printable
from dpo_engine.faults import reach
from dpo_engine.options import section_problems
from dpo_engine.reporting import swanlab_sink, trackio_sink  # noqa: F401  registers the sinks
from dpo_engine.reporting.console import open_console
from dpo_engine.reporting.contract import SINKS, CannotOpen, ConsoleSink, Opening, Sink
from dpo_engine.reporting.log_file import LOG, LogFile
from dpo_engine.reporting.trackers import MlflowSink, TensorBoardSink, WandbSink, first_line


class Sinks:
    """All sinks of a run. Only the writing rank has sinks; on other ranks, all methods do nothing.

    console, log_file  sinks for messages and metrics
    files              sinks for metrics only
    """

    def __init__(
        self, console: ConsoleSink | None = None, files: tuple[Sink, ...] = (), log_file: LogFile | None = None
    ):
        self._log_file = log_file
        self._speaking = [sink for sink in (console, log_file) if sink]
        self._sinks: tuple[Sink, ...] = (*self._speaking, *files)

    def log(self, step: int, metrics: Mapping[str, float], *, prefix: str = "") -> None:
        """Record the metrics of optimizer step `step`, with `prefix` (such as `eval/`) before each name."""
        for sink in self._sinks:
            sink.write(step, metrics, prefix)

    def say(self, text: str) -> None:
        """Print a message (above the progress bar, if there is one), and write it to the log file."""
        for sink in self._speaking:
            sink.say("\n".join(printable(line) for line in text.split("\n")))

    def close(self, error: BaseException | None = None) -> None:
        """Close all sinks. Safe to call twice.

        error  the error that ends the run; the log file records this error
        """
        if self._log_file and error:
            self._log_file.close_after(error)
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close()


def open_sinks(config: Config, *, total_steps: int, writer: bool, start_step: int = 0) -> Sinks:
    """Open the sinks that `config.logging` enables. If this rank is not the writer, open no sinks.

    total_steps  number of optimizer steps in the whole run
    writer       whether this rank writes metrics and messages
    start_step   step after which the run resumes; 0 for a new run. Lines about later steps are removed from
                 `metrics.jsonl`, and a new run removes all lines

    Raises `ConfigError` if a tracker or a registered sink cannot be opened.
    """
    if not writer:
        return Sinks()
    directory = Path(config.train.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    metrics = JsonlSink(metrics_file(config), start_step)
    log_file = LogFile(directory / LOG, total_steps, start_step)
    trackers = open_trackers(config, Opening(config, directory, start_step))
    console = open_console(config.logging.progress, total_steps, start_step)
    return Sinks(console, (metrics, *trackers), log_file)


def open_trackers(config: Config, opening: Opening) -> list[Sink]:
    """Open the experiment trackers and the registered sinks that `config.logging` enables.

    If a sink cannot be opened or has wrong options, all sinks that were opened are closed.

    Raises `ConfigError` with a line for each problem.
    """
    logging = config.logging
    wanted: dict[str, Callable[[], Sink]] = {}
    if logging.tensorboard:
        wanted["tensorboard"] = lambda: TensorBoardSink(opening)
    if logging.wandb:
        wanted["wandb"] = lambda: WandbSink(opening, logging.wandb)
    if logging.mlflow:
        wanted["mlflow"] = lambda: MlflowSink(opening, logging.mlflow)
    problems = sink_problems(config)
    for name, options in logging.sinks.items() if not problems else ():
        wanted[f"sinks.{name}"] = partial(_open_registered, name, opening, options)
    found: list[Sink] = []
    for make in wanted.values():
        try:
            found.append(make())
        except ConfigError as error:
            problems += error.problems
    if problems:
        for sink in found:
            sink.close()
        raise ConfigError(problems)
    return found


def try_open(config: Config, directory: Path) -> list[str]:
    """Try to open the trackers and registered sinks of a run, close them, and list the problems.

    directory  empty directory, to which the sinks write

    For each tracker with a server, this creates an empty run on the server.
    """
    try:
        for sink in open_trackers(config, Opening(config, directory, 0)):
            sink.close()
    except ConfigError as error:
        return list(error.problems)
    return []


def sink_problems(config: Config) -> list[str]:
    """List the problems of `logging.sinks`: names that are not registered, and wrong options."""
    return section_problems(SINKS, config.logging.sinks, "logging.sinks", plugins=bool(config.plugins))


def _open_registered(name: str, opening: Opening, options: Mapping[str, Any]) -> Sink:
    try:
        return SINKS[name](opening, **options)
    except CannotOpen as error:
        reason, way_out = error.args
    except (ImportError, OSError) as error:
        reason, way_out = first_line(error), "fix this, or remove the sink"
    raise ConfigError(f"logging.sinks.{name}: cannot be opened ({reason}); {way_out}")


def metrics_file(config: Config) -> Path:
    """Return the path of a run's metrics file."""
    return Path(config.train.output_dir) / "metrics.jsonl"


class JsonlSink:
    """Write one JSON object per line: `{"step": 3, "loss": 0.69, ...}`. A non-finite value is written as null."""

    def __init__(self, path: Path, start_step: int):
        kept = list(_lines_until(path, start_step)) if path.exists() else []
        # A finished run that is started again evaluates once more. Do not write this evaluation a second time.
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
            continue  # for example the incomplete last line of a process that was killed
        if step <= start_step and line.endswith("\n"):
            kept.append(line)
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics file; an empty list if the file does not exist."""
    return [json.loads(line) for line in _lines_until(path, math.inf)] if path.exists() else []
