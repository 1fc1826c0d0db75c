"""Describe the charts of a page as data. The page's script draws their lines, points, bars and bands with plotly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_engine.reporting.page.foreign import visible
from dpo_engine.reporting.page.measures import Measures, percent
from dpo_engine.reporting.page.run_files import RunFiles
from dpo_engine.reporting.page.thinning import thinned

MOST_GROUPS = 8
"""Maximum number of sources or length groups that a chart shows for each run."""
MOST_EVALUATIONS = 500
Chart = dict[str, Any]


class Judged(NamedTuple):
    """A run, and the measures of its newest evaluation (None if the run has no evaluation)."""

    run: RunFiles
    measures: Measures | None


CURVES = (
    # Name and title of the chart, unit of its values, explanation, and metrics.
    ("loss", "Loss", "", "If the held-out loss rises while the training loss falls, the model overfits.", ("loss",)),
    (
        "accuracy",
        "Reward accuracy",
        "share of pairs",
        "Share of pairs whose chosen response gained more log-probability than the rejected one. If no log-probability "
        "has changed, the share is 0.5.",
        ("rewards/accuracies",),
    ),
    ("margin", "Reward margin", "", "Chosen reward minus rejected reward, mean over pairs.", ("rewards/margins",)),
    (
        "rewards",
        "Rewards",
        "",
        "Beta times the log-ratio to the reference. Margins can grow while both rewards fall.",
        ("rewards/chosen", "rewards/rejected"),
    ),
    (
        "displacement",
        "Displacement",
        "nats",
        "Change of the log-probability of whole responses, compared with the reference.",
        ("displacement/chosen", "displacement/rejected"),
    ),
    ("grad_norm", "Gradient norm", "", "Before clipping.", ("grad_norm",)),
    ("learning_rate", "Learning rate", "", "", ("learning_rate",)),
)
SPEED = (
    ("pairs_per_s", "Pairs per second", "pairs/s", "Excludes the time between steps.", ("pairs_per_s",)),
    (
        "step_time",
        "Time of a step",
        "s",
        "Outside: time from the end of one logged step to the start of the next, including evaluations and saves.",
        ("step_time_s", "outside"),
    ),
    ("mfu", "Model FLOPs utilization", "", "Share of the GPUs' peak FLOP/s.", ("mfu",)),
    (
        "layout_gain",
        "Layout gain",
        "",
        "Operations that padded rows would need, divided by the operations executed.",
        ("layout_gain",),
    ),
    (
        "memory",
        "Memory of rank 0",
        "bytes",
        "Maximum so far.",
        ("peak_memory_bytes", "reserved_memory_bytes"),
    ),
)
OF_TOKENS = {"accuracy": ("loss_margin/accuracies",)}
"""Additional metrics, by name of the chart. They exist only if the loss compares log-probabilities per token."""
WITHOUT_REFERENCE = {
    "accuracy": "Share of pairs whose chosen response is more likely than the rejected one.",
    "rewards": "Beta times the log-probability of whole responses.",
}
"""Explanations for runs without a reference."""
LABELS = {
    "loss_margin/accuracies": "per token",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "displacement/chosen": "chosen",
    "displacement/rejected": "rejected",
    "step_time_s": "step",
    "outside": "outside",
    "peak_memory_bytes": "tensors",
    "reserved_memory_bytes": "reserved",
}
SIDES = {"chosen": "chosen", "rejected": "rejected"}


def curves(judged: Sequence[Judged], table: Sequence[Any] = CURVES) -> Iterator[Chart]:
    """Yield the charts of metrics over steps: thin lines for training, thick lines for held-out pairs, and events."""
    many = len(judged) > 1
    for name, title, unit, note, metrics in table:
        lines = []
        metrics += OF_TOKENS.get(name, ())
        note = _note(name, note, judged)
        for place, (run, _) in enumerate(judged):
            for number, metric in enumerate(metrics):
                for prefix in ("", "eval/"):
                    if line := _line(run, prefix + metric):
                        part = LABELS.get(metric, "")
                        words = [run.name if many else "", part, _kind(prefix, metric, table)]
                        label = " · ".join(word for word in words if word)
                        color = f"run{place}" if many else part if part in SIDES else f"run{number}"
                        look = {"color": color, "thin": not prefix, "dash": bool(many and number)}
                        lines.append({**line, "name": label, **look})
        if lines:
            marks = [mark for place, (run, _) in enumerate(judged) for mark in events(run, place if many else None)]
            # If there are many lines, the legend names only the thick ones. The thin ones have the same colors.
            unnamed = len(lines) > 2 and not all(line["thin"] for line in lines)
            lines = [line | {"unnamed": unnamed and line["thin"]} for line in lines]
            yield {"id": name, "title": title, "note": note, "x": "step", "y": unit, "traces": lines, "marks": marks}


def _note(name: str, note: str, judged: Sequence[Judged]) -> str:
    """Return the explanation of a chart: the text for runs with a reference, for runs without a reference, or both."""
    other = WITHOUT_REFERENCE.get(name)
    kinds = {run.has_reference for run, _ in judged}
    if other is None or kinds == {True}:
        return note
    return other if kinds == {False} else f"{note} Without a reference: {other[0].lower()}{other[1:]}"


def _kind(prefix: str, metric: str, table: Sequence[Any]) -> str:
    if table is SPEED or metric in ("grad_norm", "learning_rate"):
        return ""
    return "held out" if prefix else "training"


def _line(run: RunFiles, metric: str) -> Chart | None:
    if metric == "outside":
        found = _outside(run)
    else:
        found = run.series.get(metric)
    if found is None or not np.isfinite(found[1]).any():
        return None
    steps, values = thinned(*found)
    return {"type": "line", "X": numbers(steps), "Y": numbers(values), "dots": len(values) < 60}


def _outside(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
    """Return, for each step, the seconds between the end of the previous step and the start of this step.

    Return None if the times of the steps are unknown. A step is omitted if the previous step was not logged, or if the
    run was restarted between the two steps.
    """
    ends, took = run.series.get("time"), run.series.get("step_time_s")
    if ends is None or took is None or len(ends.steps) < 2 or not np.array_equal(ends.steps, took.steps):
        return None
    next_to = (np.diff(ends.steps) == 1) & ~_restarted(run, ends.steps)
    gaps = np.diff(ends.values) - took.values[1:]
    return ends.steps[1:][next_to], np.maximum(gaps[next_to], 0)


def _restarted(run: RunFiles, steps: np.ndarray) -> np.ndarray:
    """Return, for every two successive logged steps, whether the run was restarted between them [n - 1]."""
    return np.diff(np.searchsorted(sorted(run.starts[1:]), steps)) > 0


def training_time(run: RunFiles) -> float | None:
    """Return the seconds from the start of the first step to the end of the last one, excluding pauses before restarts.

    Return None if the times of the steps are unknown.
    """
    ends, took = run.series.get("time"), run.series.get("step_time_s")
    if ends is None or took is None or not np.array_equal(ends.steps, took.steps):
        return None
    gaps = np.where(_restarted(run, ends.steps), took.values[1:] * np.diff(ends.steps), np.diff(ends.values))
    return float(took.values[0] + gaps.sum())


def events(run: RunFiles, place: int | None = None) -> list[Chart]:
    """Return the marks to draw in curves: restarts, saves, skipped steps, and the best evaluated step.

    place   position of the run among several runs; None if there is only one run. With several runs, saves are omitted
    """
    found = [{"at": step, "kind": "restart", "text": f"restarted after step {step}"} for step in run.starts[1:] if step]
    found += [{"at": step, "kind": "save", "text": f"saved step {step}"} for step in run.saved[-200:]]
    skipped = run.series.get("skipped_steps")
    if skipped is not None:
        rises = np.flatnonzero(np.diff(skipped.values, prepend=0.0) > 0)[:200]
        found += [{"at": int(skipped.steps[i]), "kind": "skip", "text": "skipped step"} for i in rises]
    if best := best_step(run):
        found.append({"at": best[0], "kind": "best", "text": f"best {best[1]}: step {best[0]}"})
    return found if place is None else [mark | {"run": place} for mark in found if mark["kind"] != "save"]


def best_step(run: RunFiles) -> tuple[int, str] | None:
    """Return the best evaluated step, and the metric that decides.

    The metric is checkpoint.keep_best.metric if that key is set, otherwise eval/loss.

    Return None if the metric has fewer than two values, or if none of them is finite.
    """
    asked = run.get("checkpoint.keep_best") or {}
    metric = str(asked.get("metric", "eval/loss"))
    lowest = asked.get("mode") == "min" or (asked.get("mode") is None and metric.endswith("loss"))
    held = run.series.get(metric)
    if held is None or len(held.values) < 2 or not np.isfinite(held.values).any():
        return None
    place = np.nanargmin(held.values) if lowest else np.nanargmax(held.values)
    return int(held.steps[place]), metric


def held_out(judged: Sequence[Judged]) -> Iterator[Chart]:
    """Yield up to three charts of the accuracies at the evaluated steps, with confidence intervals.

    The first chart has one line per run, for all pairs. For each run, the second chart has a line for each source, and
    the third one has a line for each length group. A chart by source or by length is omitted if it would have only one
    group.
    """
    many = len(judged) > 1
    what = {"accuracy": "Reward accuracy", "likelihood_accuracy_per_token": "Accuracy by log-probabilities per token"}
    measures = " or ".join(dict.fromkeys(what[run.accuracy] for run, _ in judged))
    titles = {
        "all": ("held", "Held-out accuracy", f"{measures} with 95% intervals."),
        "source": ("sources", "Accuracy by source", "Bars are 95% intervals."),
        "length": ("lengths", "Accuracy by length", "Length: tokens of the longer response. Bars are 95% intervals."),
    }
    for by, (name, title, note) in titles.items():
        traces, labels = [], set()
        for place, (run, _) in enumerate(judged):
            groups: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
            for step in _spread(sorted(run.summaries)):
                for group in run.summaries[step]["groups"]:
                    if group["by"] == by and run.accuracy in group:
                        groups.setdefault(str(group["name"]), []).append((step, group[run.accuracy]))
            for number, (label, points) in enumerate(list(groups.items())[:MOST_GROUPS]):
                labels.add(label)
                own = visible(_short(label, by), 60) if by != "all" else ""
                words = [word for word in (run.name if many else "", own) if word]
                traces.append(
                    {
                        "type": "estimate",
                        "name": " · ".join(words) or "accuracy",
                        "color": f"run{place if many else number}",
                        "dash": bool(many and number),
                        "X": [step for step, _ in points],
                        "Y": numbers([value["mean"] for _, value in points]),
                        "low": numbers([value["low"] for _, value in points]),
                        "high": numbers([value["high"] for _, value in points]),
                    }
                )
        if traces and (by == "all" or len(labels) > 1):
            yield {"id": name, "title": title, "note": note, "x": "step", "y": "share of pairs", "traces": traces}


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most `MOST_EVALUATIONS` of the steps, including the first and the last one."""
    places = np.linspace(0, len(steps) - 1, min(len(steps), MOST_EVALUATIONS)).astype(int)
    return [steps[i] for i in sorted(set(places.tolist()))]


def _short(name: str, by: str) -> str:
    return name.rpartition("/")[2] if by == "source" else name


def numbers(values: Any) -> list[float | int | None]:
    """Return numbers for JSON: integers unchanged, others with six significant digits, and None if not finite."""
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        return array.tolist()
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in array.astype(float).tolist()]


def summary_line(judged: Judged) -> str:
    """Return one line with the newest evaluation of a run."""
    m = judged.measures
    if m is None:
        return "not evaluated"
    return f"accuracy{' per token' * m.compares_tokens} {percent(m.accuracy.mean)} after step {m.step}"
