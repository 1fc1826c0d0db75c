"""Check settings of evaluations: the metric by which checkpoints are compared, and intervals given in epochs."""

import math
from fractions import Fraction

from dpo_engine.config.rules import facts_of, reads_reference, value_at
from dpo_engine.config.run import Config
from dpo_engine.config.section import interval_of
from dpo_engine.training.metrics import METRICS, Reported, source_names
from dpo_engine.wording import nearest

INTERVALS = ("train.eval_interval", "checkpoint.save_interval")


def interval_problems(config: Config, steps_per_epoch: int) -> list[str]:
    """Return an error line for each interval that is shorter than one step."""
    found = []
    for key in INTERVALS:
        interval = interval_of(value := value_at(config, key))
        if isinstance(interval, Fraction) and interval * steps_per_epoch < 1:
            least = math.ceil(Fraction(10000, steps_per_epoch)) / 10000
            steps = f"{steps_per_epoch} step{'s' * (steps_per_epoch > 1)}"
            found.append(
                f"{key}={value}: is less than one step, because an epoch has {steps}; set at least {least:g}epoch, or "
                "1 for every step"
            )
    return found


def intervals_in_steps(config: Config, steps_per_epoch: int) -> list[str]:
    """Return a line for each interval that is given in epochs, with its length in steps."""
    return [
        f"{key}={value_at(config, key)}: length in steps: {float(interval * steps_per_epoch):.4g}"
        for key in INTERVALS
        if isinstance(interval := interval_of(value_at(config, key)), Fraction)
    ]


def metric_problems(config: Config) -> list[str]:
    """Return an error line if no evaluation reports the metric of ``checkpoint.keep_best``.

    A run with callbacks is not checked here, because callbacks can add metrics, which are known only after the
    first evaluation. If the loss is invalid, the metric is not checked either.
    """
    by = config.checkpoint.keep_best
    if by is None or config.callbacks or (known := evaluation_metrics(config)) is None or by.metric in known:
        return []
    if by.metric.removeprefix("eval/") in METRICS:
        hint = "the documentation of metrics says when it is reported"
    else:
        near = nearest(by.metric, known)
        hint = f"did you mean {near}?" if near else "the documentation of metrics lists all metrics"
    return [f"{unreported(by.metric)}; {hint}"]


def evaluation_metrics(config: Config) -> list[str] | None:
    """Return the names of the metrics that a run's evaluations report, with the prefix ``eval/``.

    Metrics of callbacks are not included. Metrics of every data source are included, although an evaluation reports no
    metrics of a source without held-out pairs. Returns None if the loss or its options are invalid.
    """
    if (facts := facts_of(config.loss)) is None:
        return None
    reported = Reported(
        reference=reads_reference(config),
        entropy=config.logging.entropy,
        sources=source_names([source.path for source in config.data.validation or config.data.train]),
        averages=facts.averages,
        parts=tuple(facts.parts),
    )
    return [f"eval/{name}" for name in reported.names]


def unreported(metric: str) -> str:
    """Return the first part of the error line for a metric that no evaluation reports."""
    return f"checkpoint.keep_best.metric={metric}: no evaluation of this run reports this metric"
