"""Callbacks that read the metric by which checkpoints are compared.

`ReportedMetric` checks that the metric is reported. `StopAfterNoGain` ends a run whose metric does not improve.

These callbacks save no state. `StopAfterNoGain` reads past evaluations from metrics.jsonl, which a resumed run restores
from the copy in its checkpoint. A run that is killed and resumed, even in another layout, therefore ends at the same
step as an uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo_engine.config.sections import KeepBest
from dpo_engine.errors import ConfigError
from dpo_engine.reporting.sinks import metrics_file, read_metrics
from dpo_engine.training.callbacks import Callback, Run
from dpo_engine.training.evaluation_settings import unreported
from dpo_engine.wording import join

ROUNDING = 1e-6
"""A difference of at most this share of the best value counts as rounding and not as a gain."""


class ReportedMetric(Callback):
    """Check that the first evaluation reports the metric of ``checkpoint.keep_best``."""

    def __init__(self, by: KeepBest):
        self.by = by
        self._checked = False

    def on_start(self, run: Run) -> None:
        """Log the metric by which the best checkpoints are chosen."""
        run.sinks.say(f"best checkpoint: {self.by} (checkpoint.keep_best; number kept: {self.by.count})")

    def on_eval(self, run: Run, metrics: dict[str, float]) -> None:
        """Raise :class:`~dpo_engine.errors.ConfigError` on rank 0 if the first evaluation lacks the metric."""
        # Only rank 0 checks, because other callbacks add metrics on rank 0 only.
        if not self._checked and _first(run) and self.by.metric.removeprefix("eval/") not in metrics:
            reported = join([f"eval/{name}" for name in sorted(metrics)], "and")
            raise ConfigError(f"{unreported(self.by.metric)}; the reported metrics are {reported}")
        self._checked = True


class StopAfterNoGain(Callback):
    """End the run after ``patience`` consecutive evaluations without a new best value. Rank 0 decides."""

    def __init__(self, patience: int, by: KeepBest):
        self.patience = patience
        self.by = by
        self.values: list[float | None] = []

    def on_start(self, run: Run) -> None:
        """Read the values of the evaluations up to the step from which the run resumes."""
        if _first(run):
            lines = [line for line in read_metrics(metrics_file(run.config)) if line["step"] <= run.step]
            self.values = [line[self.by.metric] for line in lines if self.by.metric in line]

    def on_eval(self, run: Run, metrics: dict[str, float]) -> str | None:
        """Return a reason to end the run if the latest ``patience`` evaluations had no gain.

        The evaluation before the first step counts, but never ends the run.
        """
        if not _first(run):
            return None
        value = metrics.get(self.by.metric.removeprefix("eval/"), math.nan)
        self.values.append(value if math.isfinite(value) else None)
        if run.step == 0 or evaluations_without_gain(self.values, self.by) < self.patience:
            return None
        times = f"{self.patience} evaluation{'s' * (self.patience > 1)}"
        return f"no gain in {times} ({self.by})"


def _first(run: Run) -> bool:
    return run.engine.groups.world.rank() == 0


def evaluations_without_gain(values: Sequence[float | None], by: KeepBest) -> int:
    """Return the number of evaluations after the latest evaluation that had a new best value.

    values   the metric's value in each evaluation, in order; None (not finite) does not count as a gain
    """
    sign = -1 if by.direction == "min" else 1
    best, since = None, 0
    for value in values:
        if value is not None and (best is None or sign * (value - best) > ROUNDING * abs(best)):
            best, since = value, 0
        else:
            since += 1
    return since
