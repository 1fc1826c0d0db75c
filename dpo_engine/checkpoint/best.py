"""Find the best step of a run by its held-out metrics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

METRICS = {"loss": ("eval/loss", -1), "accuracy": ("eval/rewards/accuracies", 1), "margin": ("eval/rewards/margins", 1)}
"""Metrics that can select the best step: each name in metrics.jsonl, with 1 if higher is better and -1 if lower is."""


class Best(NamedTuple):
    """A step and its held-out value."""

    step: int
    value: float


def best_step(lines: Sequence[Mapping[str, Any]], by: str, among: Iterable[int] | None = None) -> Best | None:
    """Return the step with the best held-out value (on a tie, the earliest); None if no step has a finite value.

    lines  the lines of the run's metrics.jsonl; if a step has several lines, the last one is used
    by     a key of :data:`METRICS`
    among  the steps to choose from; None: all steps
    """
    name, sign = METRICS[by]
    values = {line["step"]: line[name] for line in lines if line.get(name) is not None}
    allowed = values if among is None else values.keys() & set(among)
    step = max(sorted(allowed), key=lambda step: sign * values[step], default=None)
    return None if step is None else Best(step, values[step])
