"""Describe, as data, the charts of single pairs: log-probability differences, their change, calibration, and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dpo_engine.reporting.page.charts import Chart, Judged, numbers
from dpo_engine.reporting.page.measures import Measures
from dpo_engine.reporting.page.run_files import RunFiles

MOST_POINTS = 3000
"""Maximum number of pairs in a scatter plot. Pairs with extreme values are always drawn."""


def pair_charts(judged: Sequence[Judged]) -> Iterator[Chart]:
    """Yield charts of the newest evaluations: log-probability differences, their change, calibration, and length."""
    known = [(place, run, m) for place, (run, m) in enumerate(judged) if m is not None]
    if not known:
        return
    many = len(judged) > 1
    yield _histogram(known, many)
    flips = [_flips(place, run.name if many else "pairs", m) for place, run, m in known if m.has_reference]
    if flips:
        yield {
            "id": "flip",
            "title": "Before and after",
            "note": "Log-probability difference of each pair. Top left: pairs that became right; bottom right: pairs "
            "that became wrong. Above the dashed diagonal, the difference grew.",
            "x": "reference, nats",
            "y": "policy, nats",
            "traces": flips,
            "cross": True,
            "diagonal": True,
        }
    yield _calibration(known, many)
    yield _lengths(known, many)


def _histogram(known: Sequence[tuple[int, RunFiles, Measures]], many: bool) -> Chart:
    series = [(run.name if many else "policy", f"run{place}", m.policy_margin) for place, run, m in known]
    if known[0][2].has_reference:
        series.insert(0, ("reference", "quiet", known[0][2].reference_margin))
    everything = np.concatenate([values for *_, values in series])
    low, high = np.quantile(everything, [0.002, 0.998])
    # Each end of the axis is at most `near` beyond its quantile, unless the axis must extend further to include 0.
    # Without this limit, a few extreme values could stretch the axis so far that most pairs fall into few bars.
    near = 0.25 * (high - low)
    low = max(low - near, everything.min())
    high = min(high + near, everything.max())
    edges = np.linspace(min(low, 0), max(high, 0) if high > low else low + 1, 49)
    middle = 0.5 * (edges[1:] + edges[:-1])
    text = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    below, above = (everything < edges[0]).sum(), (everything > edges[-1]).sum()
    if below:
        text[0] = f"≤ {edges[1]:.3g}"
    if above:
        text[-1] = f"≥ {edges[-2]:.3g}"
    traces = []
    for name, color, values in series:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        bars = {"X": numbers(middle), "Y": counts.tolist(), "text": text}
        traces.append({"type": "bars", "name": name, "color": color, **bars})
    note = (
        "Log-probability of the chosen response minus that of the rejected one. Right of 0, the chosen response is "
        "more likely."
    )
    if below or above:
        ends = [f"of {edges[-2]:.3g} or more"] * bool(above) + [f"up to {edges[1]:.3g}"] * bool(below)
        bars = "outermost bars contain" if len(ends) > 1 else "last bar contains" if above else "first bar contains"
        note += f" The {bars} all values {' and all values '.join(ends)}."
    return {
        "id": "margins",
        "title": "Log-probability differences",
        "note": note,
        "x": "nats",
        "y": "pairs",
        "traces": traces,
        "zero": True,
    }


def _chosen_points(*values: np.ndarray) -> np.ndarray:
    """Return the rows to draw in a scatter plot.

    values   the columns of the plot

    If there are at most `MOST_POINTS` rows, all rows are drawn. Otherwise, the drawn rows are the 50 rows with the
    smallest values and the 50 rows with the largest values of each column, and evenly spaced rows.
    """
    count = len(values[0])
    if count <= MOST_POINTS:
        return np.arange(count)
    extreme = [np.argsort(column)[part] for column in values for part in (slice(50), slice(-50, None))]
    return np.unique(np.concatenate([*extreme, np.linspace(0, count - 1, MOST_POINTS - 200).astype(int)]))


def _flips(place: int, name: str, m: Measures) -> Chart:
    rows = _chosen_points(m.reference_margin, m.policy_margin)
    points = {"X": numbers(m.reference_margin[rows]), "Y": numbers(m.policy_margin[rows])}
    return {"type": "points", "name": name, "color": f"run{place}", **points, "pair": rows.tolist()}


def _calibration(known: Sequence[tuple[int, RunFiles, Measures]], many: bool) -> Chart:
    traces: list[Chart] = [
        {"type": "line", "name": "calibrated", "color": "quiet", "X": [0.5, 1], "Y": [0.5, 1], "thin": True}
    ]
    briers = []
    for place, run, m in known:
        confidence, accuracy, counts = (list(column) for column in zip(*m.reliability, strict=True))
        label = run.name if many else "pairs"
        briers.append(f"{f'{run.name}: ' if many else ''}Brier {m.brier:.3f}, ECE {m.calibration_error:.3f}")
        text = [f"{count:,} pair(s)" for count in counts]
        part = {"X": numbers(confidence), "Y": numbers(accuracy), "text": text, "dots": True}
        traces.append({"type": "line", "name": label, "color": f"run{place}", **part})
    return {
        "id": "calibration",
        "title": "Calibration",
        "note": f"Accuracy of pairs by confidence. The confidence is sigmoid(|reward margin|). {'; '.join(briers)}.",
        "x": "confidence",
        "y": "accuracy",
        "traces": traces,
    }


def _lengths(known: Sequence[tuple[int, RunFiles, Measures]], many: bool) -> Chart:
    traces = []
    for place, run, m in known:
        margin = m.reward_margin
        rows = _chosen_points(m.length_difference.astype(float), margin)
        color = f"run{place}"
        points = {"X": m.length_difference[rows].tolist(), "Y": numbers(margin[rows]), "pair": rows.tolist()}
        traces.append({"type": "points", "name": run.name if many else "pairs", "color": color, **points})
        edges = np.unique(np.quantile(m.length_difference, np.linspace(0, 1, 11), method="lower"))
        bins = np.searchsorted(edges, m.length_difference, side="right")
        means = [(m.length_difference[bins == i].mean(), margin[bins == i].mean()) for i in np.unique(bins)]
        xs, ys = (list(column) for column in zip(*means, strict=True))
        line = {"X": numbers(xs), "Y": numbers(ys), "dots": True}
        look = {"name": f"{run.name} mean", "color": color} if many else {"name": "mean", "color": "accent"}
        traces.append({"type": "line", **look, **line})
    return {
        "id": "length",
        "title": "Reward margin against length",
        "note": "A slope means that the reward depends on the length.",
        "x": "tokens of chosen minus rejected",
        "y": " or ".join(sorted({m.margin_name for *_, m in known})),
        "whole": True,
        "traces": traces,
        "cross": True,
    }
