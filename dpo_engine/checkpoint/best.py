"""Find the best step of a run by its held-out metrics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

METRICS = {"loss": ("eval/loss", -1), "accuracy": ("eval/rewards/accuracies", 1), "margin": ("eval/rewards/margins", 1)}
"""Metrics to choose by: the name in metrics.jsonl, and 1 if the highest value is the best, -1 if the lowest is."""


class Best(NamedTuple):
    """A step and its held-out value."""

    step: int
    value: float


def best_step(lines: Sequence[Mapping[str, Any]], by: str, among: Iterable[int] | None = None) -> Best | None:
    """Return the step with the best held-out value, the earliest of equals; None if no step has a finite value.

    lines  the lines of the run's metrics.jsonl; the last line of a step counts
    by     a key of :data:`METRICS`
    among  the steps to choose from; None: all
    """
    name, sign = METRICS[by]
    values = {line["step"]: line[name] for line in lines if line.get(name) is not None}
    allowed = values if among is None else values.keys() & set(among)
    step = max(sorted(allowed), key=lambda step: sign * values[step], default=None)
    return None if step is None else Best(step, values[step])
