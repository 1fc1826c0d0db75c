"""Sort the steps of a run by a metric of the evaluations, and choose the checkpoints to keep and to remove."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_engine.checkpoint.directory import intact, steps, superseded
from dpo_engine.config.run import Config
from dpo_engine.config.sections import KeepBest
from dpo_engine.errors import CheckpointError
from dpo_engine.reporting.sinks import metrics_file, read_metrics

DEFAULT = KeepBest(metric="eval/loss")
"""The metric by which steps are compared if ``checkpoint.keep_best`` is null."""


class Best(NamedTuple):
    """A step, and the value of the metric in the evaluation after this step."""

    step: int
    value: float

    def __str__(self) -> str:
        return f"step {self.step} ({self.value:.6g})"


def criterion(config: Config) -> KeepBest:
    """Return the run's ``checkpoint.keep_best``, or :data:`DEFAULT` if it is null."""
    return config.checkpoint.keep_best or DEFAULT


def ranking(lines: Sequence[Mapping[str, Any]], by: KeepBest, among: Collection[int] | None = None) -> list[Best]:
    """Return the evaluated steps, from best to worst. On a tie, the earlier step is first.

    Steps without a finite value are left out.

    lines  the lines of the run's metrics.jsonl; if several lines of a step have the metric, the last line counts
    by     the metric and its direction
    among  the steps to include; None: all steps
    """
    sign = 1 if by.direction == "min" else -1
    values = {line["step"]: line[by.metric] for line in lines if line.get(by.metric) is not None}
    allowed = [step for step in sorted(values) if among is None or step in among]
    return [Best(step, values[step]) for step in sorted(allowed, key=lambda step: sign * values[step])]


def choose(
    folder: Path, step: int, history: Path, *, keep_last: int, keep_best: KeepBest | None, damaged: Collection[str]
) -> tuple[int | None, list[str]]:
    """Return the step of the best checkpoint, and the names of the checkpoints to remove, oldest first.

    The step is None if ``keep_best`` is None, or if no step with a checkpoint has a value of the metric.

    step                the newest step; its checkpoint may not be published yet
    history             the run's metrics.jsonl
    keep_last, damaged  as for :func:`~dpo_engine.checkpoint.directory.superseded`
    keep_best           the metric by which checkpoints are kept in addition to the ``keep_last`` newest checkpoints;
                        None: keep only the newest checkpoints
    """
    best: list[int] = []
    if keep_best:
        ranked = ranking(read_metrics(history), keep_best, {step, *intact(folder, damaged)})
        best = [found.step for found in ranked[: keep_best.count]]
    old = superseded(folder, step, keep_last=keep_last, damaged=damaged, best=best)
    return next(iter(best), None), old


def must_save(folder: Path, step: int, history: Path, *, keep_best: KeepBest, damaged: Collection[str]) -> bool:
    """Return whether ``step``, which has just been evaluated, must be saved because it is among the best steps.

    Only ``step`` and the steps that have intact checkpoints are compared. For the arguments, see :func:`choose`.
    """
    ranked = ranking(read_metrics(history), keep_best, {step, *intact(folder, damaged)})
    return step in [found.step for found in ranked[: keep_best.count]]


def best_saved(config: Config, say: Callable[[str], None] = lambda line: None) -> int:
    """Return the step of the run's best checkpoint according to :func:`criterion`.

    say  called with a line about the choice, and with another line if a better step has no checkpoint

    Raises :class:`~dpo_engine.errors.CheckpointError` if no step with a checkpoint has a value of the metric.
    """
    folder, by = config.checkpoint_dir, criterion(config)
    lines = read_metrics(metrics_file(config))
    ranked = ranking(lines, by, steps(folder))
    if not ranked:
        raise CheckpointError(
            f"{folder}: no checkpoint has a value of {by.metric} in {metrics_file(config)}; evaluate at the steps that "
            "are saved (train.eval_interval), or choose a step with --step"
        )
    say(f"best checkpoint by {by}: {ranked[0]}")
    overall = ranking(lines, by)[0]
    if overall.step == 0:
        say(f"{overall} was better, but it is the model before training and has no checkpoint")
    elif overall.step != ranked[0].step:
        advice = (
            ""
            if config.checkpoint.keep_best
            else "; to keep the checkpoint of the best step, set checkpoint.keep_best in the next run"
        )
        say(f"{overall} was better but has no checkpoint{advice}")
    return ranked[0].step
