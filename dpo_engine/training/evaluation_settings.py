"""Check settings of evaluations: the metric that compares checkpoints, and intervals that are parts of an epoch."""

import math
import re
from fractions import Fraction

from dpo_engine.config.rules import value_at
from dpo_engine.config.run import Config
from dpo_engine.config.section import interval_of
from dpo_engine.training.metrics import METRICS, STEP_ONLY
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
    """Return a line for each interval that is a part of an epoch, with its length in steps."""
    return [
        f"{key}: {value_at(config, key)} is {float(interval * steps_per_epoch):.4g} steps"
        for key in INTERVALS
        if isinstance(interval := interval_of(value_at(config, key)), Fraction)
    ]


def metric_problem(config: Config) -> str | None:
    """Return the error line for a metric of ``checkpoint.keep_best`` that no evaluation reports; None if it is known.

    A run with callbacks may report other metrics, so its metrics are known only after the first evaluation.
    """
    by = config.checkpoint.keep_best
    if by is None or config.callbacks:
        return None
    known = [name for name in METRICS if name not in STEP_ONLY]
    if not config.logging.entropy:
        known = [name for name in known if not name.startswith("entropy/")]
    patterns = [re.escape(name).replace("NAME", ".+") for name in known]
    if any(re.fullmatch(pattern, by.metric.removeprefix("eval/")) for pattern in patterns):
        return None
    near = nearest(by.metric, [f"eval/{name}" for name in known])
    hint = f"did you mean {near}?" if near else "the documentation of metrics lists all of them"
    return f"{unreported(by.metric)}; {hint}"


def unreported(metric: str) -> str:
    """Return the first part of an error line: no evaluation reports ``metric``."""
    return f"checkpoint.keep_best.metric={metric}: no evaluation reports this metric"
