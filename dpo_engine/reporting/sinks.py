"""Write metrics and messages to sinks: the console, `metrics.jsonl`, and the enabled experiment trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpo_engine.atomic_files import naming, write_whole
from dpo_engine.config.run import Config
from dpo_engine.config.sections import MlflowConfig, WandbConfig
from dpo_engine.errors import ConfigError, printable
from dpo_engine.faults import reach
from dpo_engine.wording import clock

if TYPE_CHECKING:
    from rich.console import Console

# Label and format of each metric on the console. Other metrics are written only to metrics.jsonl and the trackers.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/accuracies": ("accuracy", "{:.3f}"),
    "rewards/margins": ("margin", "{:+.4f}"),
    "displacement/chosen": ("displacement", "{:+.3f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "pairs_per_s": ("pairs/s", "{:.1f}"),
}
LIVE = ("loss", "rewards/accuracies", "rewards/margins", "pairs_per_s")


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record the metrics of one step. `prefix` is added before the name of each metric."""

    def close(self) -> None:
        """Flush and close the sink."""


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


class TensorBoardSink:
    def __init__(self, directory: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides earlier events about steps that will run again.
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else 0)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Log to Weights & Biases. A resumed run continues the same W&B run. Offline mode needs no network."""

    def __init__(self, asked: WandbConfig, config: Config, directory: Path, start_step: int):
        import wandb

        remembered = directory / "wandb" / "run_id"
        try:
            self._run = wandb.init(
                project=asked.project,
                name=asked.name or directory.resolve().name,
                mode=asked.mode,
                dir=str(directory),
                id=_recall(remembered, start_step),
                resume="allow",
                config=config.model_dump(mode="json"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"logging.wandb.project={asked.project}: W&B cannot be opened ({_first_line(error)}); log in, or set "
                "logging.wandb.mode=offline"
            ) from error
        # W&B's own step must not decrease, but the optimizer step does when a run resumes from an older checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        _remember(remembered, self._run.id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self._run.log({"step": step, **{prefix + name: value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Log to MLflow. A resumed run continues the same MLflow run."""

    def __init__(self, asked: MlflowConfig, config: Config, directory: Path, start_step: int):
        import mlflow

        remembered = directory / "mlflow" / "run_id"
        try:
            if asked.tracking_uri:
                mlflow.set_tracking_uri(asked.tracking_uri)
            mlflow.set_experiment(asked.experiment)
            run = mlflow.start_run(run_id=_recall(remembered, start_step), run_name=directory.resolve().name)
            if start_step == 0:
                mlflow.log_params(dict(_flat(config.model_dump(mode="json"))))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise ConfigError(
                f"logging.mlflow.experiment={asked.experiment}: MLflow cannot be opened ({_first_line(error)}); check "
                "logging.mlflow.tracking_uri"
            ) from error
        self._mlflow = mlflow
        _remember(remembered, run.info.run_id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self._mlflow.log_metrics({prefix + name: value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _recall(path: Path, start_step: int) -> str | None:
    return path.read_text(encoding="utf-8").strip() if start_step and path.exists() else None


def _remember(path: Path, run_id: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _flat(nested: Mapping[str, Any], above: str = "") -> Any:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def open_console(progress: str, total_steps: int, start_step: int) -> ConsoleSink:
    """Open the console that `logging.progress` selects. `auto`: a live bar on a terminal, otherwise plain lines."""
    if progress == "rich" or (progress == "auto" and sys.stdout.isatty()):
        return RichConsole(total_steps, start_step, force=progress == "rich")
    return PlainConsole(total_steps, start_step, quiet=progress == "off")


class ConsoleSink(Sink, Protocol):
    def say(self, text: str) -> None:
        """Print a message."""


class PlainConsole:
    """Print each line at once, without a progress bar, for log files and pipes. If `quiet`, print only messages."""

    def __init__(self, total_steps: int, start_step: int, *, quiet: bool):
        self._total, self._start, self._quiet = total_steps, start_step, quiet
        self._began: tuple[int, float] | None = None

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        if self._quiet:
            return
        name = prefix.strip("/") or "step"
        width = len(str(self._total))
        parts = [f"{name} {step:>{width}}/{self._total}" if name == "step" else f"{name} at step {step}"]
        parts += _shown(values, SHOWN)
        if name == "step":
            parts.append(f"eta {self._remaining(step)}")
        self.say("  ".join(parts))

    def _remaining(self, step: int) -> str:
        """Estimate the remaining time from the pace since the first printed step; the steps before it may be slower."""
        now = time.monotonic()
        if self._began is None or step <= self._began[0]:
            self._began = (step, now)
            return "-" if step < self._total else "0:00:00"
        first, since = self._began
        return clock((now - since) / (step - first) * (self._total - step))

    def say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        pass


class RichConsole:
    """Show a live line with steps, remaining time, and latest metrics; print evaluations and messages above it."""

    def __init__(self, total_steps: int, start_step: int, *, force: bool, console: Console | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console or Console(force_terminal=True if force else None, highlight=False)
        self._progress = Progress(
            MofNCompleteColumn(),
            # On a narrow terminal, shorten the bar to leave room for the metrics.
            BarColumn(bar_width=max(4, min(24, self._console.width - 76))),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, metrics="")
        self._progress.start()

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        if prefix:
            parts = [f"{prefix.strip('/')} at step {step}", *_shown(values, SHOWN)]
            self._console.print("  ".join(parts), markup=False, soft_wrap=True)
        else:
            self._progress.update(self._task, completed=step, metrics="  ".join(_shown(values, LIVE)))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _shown(values: Mapping[str, float], names: Any) -> list[str]:
    return [f"{SHOWN[name][0]} {SHOWN[name][1].format(values[name])}" for name in names if name in values]
