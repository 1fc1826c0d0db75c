"""Read the directory of a run: its configuration, metrics, log, and evaluations. Needs neither torch nor Megatron."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from dpo_engine.errors import ConfigError, DataError
from dpo_engine.reporting.comparison import report
from dpo_engine.reporting.log_file import LOG
from dpo_engine.reporting.pair_file import REFERENCE, Evaluation, read_evaluation
from dpo_engine.reporting.token_file import TokenText, read_tokens, tokens_path

EVALUATED = re.compile(r"step_(\d{8})\.(parquet|json)")
PUBLISHED = re.compile(r"step_(\d{8,})(\.\d+)?")
STARTED = re.compile(r"--- (started|started again) after step (\d+) of (\d+), process")
SAVED = re.compile(r"\d saved checkpoints/step_(\d+) \(")
LAYOUT = re.compile(r"layout: (tp \d.*) on \d+ rank")
STOPPED = re.compile(r"\d the run ends after step \d+ of \d+: ")
ENDED = re.compile(r"^\S+ \S+ ended: (.*)")


class Series(NamedTuple):
    """The values of a metric: steps [n] int64, ascending, and values [n] float64, nan if not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's directory.

    name         name of the run, unique on the page
    config       the run's configuration, as in config.yaml; empty if there is no such file
    series       the metrics, by name
    starts       for each start of the run, in order of time, the step after which the run continued (0: it began from
                 scratch). Starts before the last one from scratch are omitted
    total_steps  number of steps of the whole run, 0 if unknown
    saved        steps whose checkpoints were saved
    kept         steps whose checkpoints are on disk
    layout       sizes of tp, pp, vpp, cp and dp; None if unknown
    ended        the error that ended the run after its last start, or None
    stopped      whether log.txt says that the run, after its last start, ended early on request
    summaries    the summary of each evaluation, by step; see :func:`~dpo_engine.reporting.comparison.report`
    files        the Parquet file of each evaluation, by step
    evaluation   the newest evaluation whose Parquet file can be read, or None
    tokens       the tokens of those pairs of the evaluation that were selected for display
    no_tokens    why there are no tokens, and how to write them; empty if there are tokens or there is no evaluation
    problems     error lines about files that cannot be read, except the file of tokens
    """

    directory: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    total_steps: int = 0
    saved: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    layout: dict[str, int] | None = None
    ended: str | None = None
    stopped: bool = False
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    tokens: list[TokenText] = field(default_factory=list)
    no_tokens: str = ""
    problems: list[str] = field(default_factory=list)

    def get(self, path: str, default: Any = None) -> Any:
        """Return the value at a dotted key of the configuration, or `default` if the key is absent."""
        value: Any = self.config
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def step(self) -> int:
        """The last step with metrics or an evaluation; 0 if there is none."""
        known = [int(series.steps[-1]) for series in self.series.values()]
        return max([*known, *self.files, *self.summaries, 0])

    @property
    def running(self) -> bool:
        """Whether the run can still execute steps: steps remain, and the log records no error and no early end."""
        return self.step < self.total_steps and self.ended is None and not self.stopped

    @property
    def per_token(self) -> bool:
        """Whether the loss compares log-probabilities per token. Only such a loss has metrics ``loss_margin/...``."""
        return any(f"{prefix}loss_margin/accuracies" in self.series for prefix in ("", "eval/"))

    @property
    def has_reference(self) -> bool:
        """Whether rewards are relative to a reference."""
        if self.evaluation is not None:
            return bool(np.isfinite([self.evaluation.columns[name] for name in REFERENCE]).all())
        return "rewards/margins" not in self.series or "displacement/chosen" in self.series

    @property
    def accuracy(self) -> str:
        """The key of the run's accuracy in summaries; see :attr:`Measures.compares_tokens` for accuracies per token."""
        return "likelihood_accuracy_per_token" if self.per_token and not self.has_reference else "accuracy"


def read_run(directory: Path, name: str) -> RunFiles:
    """Read a run.

    Raises :class:`~dpo_engine.errors.ConfigError` if the directory contains neither metrics nor evaluations.
    """
    problems: list[str] = []
    series = _metrics(directory / "metrics.jsonl")
    last = max((int(one.steps[-1]) for one in series.values()), default=None)
    found = [(int(match[1]), match[2], path) for path, match in _evaluations(directory / "eval")]
    # Ignore evaluations of steps after the last step with metrics. They were written before the run resumed from an
    # older checkpoint, and the run has not reached these steps again.
    found = [item for item in found if last is None or item[0] <= last]
    if not series and not found:
        what = "contains no metrics.jsonl and no evaluations" if directory.is_dir() else "is a file"
        what = what if directory.exists() else "does not exist"
        raise ConfigError(f"{directory}: {what}; pass the train.output_dir of a run")
    files = {step: path for step, kind, path in found if kind == "parquet"}
    summaries = {}
    for step, kind, path in found:
        if kind == "json" and (summary := _summary(path, problems)):
            summaries[step] = summary
    kept = _kept(directory / "checkpoints")
    evaluation, tokens, no_tokens = None, [], ""
    for step in sorted(files, reverse=True):
        try:
            evaluation = read_evaluation(files[step])
        except DataError as error:
            problems += error.problems
            continue
        tokens, no_tokens = _tokens(tokens_path(files[step]), directory, step, saved=step in kept)
        if step not in summaries:  # for example, earlier versions of the engine wrote no summaries
            summaries[step] = report(evaluation)
        break
    log = _log(directory / LOG)
    return RunFiles(
        directory,
        name,
        config=_config(directory / "config.yaml", problems),
        series=series,
        summaries=summaries,
        files=files,
        evaluation=evaluation,
        tokens=tokens,
        no_tokens=no_tokens,
        problems=problems,
        kept=kept,
        **log,
    )


def _kept(folder: Path) -> list[int]:
    """Return the steps of the published checkpoints."""
    names = (path.parent.name for path in folder.glob("step_*/manifest.json"))
    return sorted({int(match[1]) for match in map(PUBLISHED.fullmatch, names) if match})


def _tokens(path: Path, directory: Path, step: int, *, saved: bool) -> tuple[list[TokenText], str]:
    """Read the tokens of an evaluation. Return the tokens, or why there are no tokens and how to write them.

    saved   whether the step has a checkpoint
    """
    why = f"{path}: does not exist"
    if path.exists():
        try:
            found, _ = read_tokens(path)
            if found:
                return found, ""
            why = f"{path}: contains no pairs"
        except DataError as error:
            why = error.problems[0].partition("; run the evaluation")[0]
    if saved:
        return [], f"{why}. To write the file: dpo-engine eval {directory}/config.yaml --step {step} --tokens 64"
    way_out = "A run with logging.token_samples=64 writes tokens at each evaluation"
    return [], f"{why}, and step {step} has no checkpoint. {way_out}"


def names_of(directories: Sequence[Path]) -> list[str]:
    """Name each path by the fewest last components that make all names different. If paths are equal, add numbers."""
    parts = [path.resolve().parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({place})" for place, part in enumerate(parts, 1)]


def _metrics(path: Path) -> dict[str, Series]:
    """Read a metrics file. If a metric has several values for a step, keep the last one. Ignore damaged lines."""
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    for line in _lines(path):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            numbers = {name: _finite(value) for name, value in record.items() if _is_number(value)}
            array("q", [step])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            continue  # such as the incomplete last line of a process that was killed
        for name, value in numbers.items():
            if name not in steps:
                steps[name], values[name] = array("q"), array("d")
            steps[name].append(step)
            values[name].append(value)
    found = {}
    for name in steps:
        known, place = np.unique(np.frombuffer(steps[name], dtype=np.int64)[::-1], return_index=True)
        found[name] = Series(known, np.frombuffer(values[name], dtype=np.float64)[::-1][place])
    return found


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _finite(value: float | None) -> float:
    """Return a number of a metrics file, nan if it is not finite. Raises ``OverflowError`` for huge integers."""
    return float("nan") if value is None or not math.isfinite(value) else float(value)


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _evaluations(folder: Path) -> Iterator[tuple[Path, re.Match]]:
    for path in sorted(folder.glob("step_*")) if folder.is_dir() else ():
        if match := EVALUATED.fullmatch(path.name):
            yield path, match


def _summary(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        for group in summary["groups"]:
            for name in ("accuracy", "margin", *({"likelihood_accuracy_per_token"} & group.keys())):
                [float(group[name][key]) for key in ("mean", "low", "high")]
            group["by"], group["name"], group["pairs"], group["loss"]  # noqa: B018  the page needs these keys
        return summary
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        problems.append(f"{path}: is not a summary of an evaluation; run the evaluation again")
        return None


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{path}: is not the configuration of a run")
        return {}
    return found


def _log(path: Path) -> dict[str, Any]:
    starts: list[int] = []
    saved: list[int] = []
    found: dict[str, Any] = {"starts": starts, "saved": saved}
    for line in _lines(path):
        if match := STARTED.search(line):
            if int(match[2]) == 0:  # the run started from scratch
                starts.clear()
                saved.clear()
            starts.append(int(match[2]))
            saved[:] = [step for step in saved if step <= starts[-1]]
            found |= {"total_steps": int(match[3]), "ended": None, "stopped": False}
        elif match := SAVED.search(line):
            saved.append(int(match[1]))
        elif match := LAYOUT.search(line):
            sizes = {name: int(size) for name, size in re.findall(r"\b([a-z]+) (\d+)", match[1])}
            found["layout"] = sizes if {"tp", "pp", "cp", "dp"} <= sizes.keys() else None
        elif STOPPED.search(line):
            found["stopped"] = True
        elif match := ENDED.match(line):
            found["ended"] = match[1]
    return found
