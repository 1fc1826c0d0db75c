"""Show the verdict and the tables of runs on a terminal, with sparklines for curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_engine.errors import printable
from dpo_engine.reporting.page.charts import CURVES, OF_TOKENS, SPEED, Judged, best_step
from dpo_engine.reporting.page.compared import comparison
from dpo_engine.reporting.page.measures import pairs_text, signed
from dpo_engine.reporting.page.run_files import RunFiles
from dpo_engine.reporting.page.settings import differing, settings
from dpo_engine.reporting.page.verdict import findings

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Maximum number of characters of a sparkline."""
SIGNS = {"good": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "red"), "note": ("·", "dim")}


def show_runs(judged: Sequence[Judged], console: Console) -> None:
    """Print the findings, tables and curves of each run.

    If there are several runs, also compare each later run with the first, and list the settings that differ between the
    runs. Single pairs are not printed.
    """
    for item in judged:
        _show_run(item, console)
    for other in judged[1:]:
        told = comparison(judged[0], other)
        _say(console, "")
        if told["problem"]:
            _say(console, f"{told['names'][0]} and {told['names'][1]}: {told['problem']}")
        if told["found"]:
            _show_comparison(told, console)
    if len(judged) > 1:
        table = _table("settings that differ", *(run.name for run, _ in judged))
        for path, values in differing([run for run, _ in judged]):
            table.add_row(*(Text(printable(text)) for text in (path, *values)))
        console.print()
        console.print(table)


def _show_comparison(told: Mapping[str, Any], console: Console) -> None:
    """Print the sentence and the table of a comparison, as on the page."""
    found, (later, first) = told["found"], told["names"]
    _say(console, told["summary"])
    names = (f"{name}, step {step or 0:,}" for name, step in zip(told["names"], found["steps"], strict=True))
    table = _table("", *names, "difference", "95 %")
    for row in told["rows"]:
        numbers = (row.later, row.first, *row.difference)
        mine, other, mean, low, high = (signed(number) for number in numbers)
        table.add_row(row.name, mine.removeprefix("+"), other.removeprefix("+"), mean, f"{low} to {high}")
    console.print(table)
    _say(
        console,
        f"{pairs_text(found['common'])} in common; the reward accuracy is higher in {later} than in {first} for "
        f"{found['won']:,} of them, lower for {found['lost']:,} and equal for {found['tied']:,}; sign test of prompts: "
        f"p = {found['sign_test']:.3g}",
    )
    if found["other_units"]:
        _say(console, f"the runs differ in {' and '.join(found['other_units'])}, so margins have different units")


def _show_run(item: Judged, console: Console) -> None:
    run, measures = item
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    _say(console, f"{run.name}: step {run.step:,}{of}")
    for problem in run.problems:
        _say(console, f"  {problem}")
    for found in findings(run, measures):
        sign, style = SIGNS[found.kind]
        line = Text(f"{sign} ", style=style).append(printable(found.title), style="bold")
        console.print(line, soft_wrap=True)
        for text in (found.evidence, f"→ {found.advice}" if found.advice else ""):
            if text:
                _say(console, f"    {text}")
    console.print()
    console.print(_groups(run, measures.step if measures else None))
    console.print(_sparklines(run))
    if best := best_step(run):
        _say(console, f"best evaluation: step {best[0]} by {best[1]}")
    changed = [f"{key.path}={key.value}" for key in settings(run) if key.shown]
    _say(console, f"changed settings: {', '.join(changed)}" if changed else "settings: no readable config.yaml")


def _groups(run: RunFiles, step: int | None) -> Table:
    """Return a table of results for all pairs, for the pairs of each source, and for pairs grouped by length.

    The table shows the number of pairs and their mean loss, accuracy, and reward margin.

    step   the step that the verdict describes; if it is None or has no summary, the last step with a summary is used
    """
    step = step if step in run.summaries else max(run.summaries, default=None)
    name = run.accuracy if step is not None and run.accuracy in run.summaries[step]["groups"][0] else "accuracy"
    label = "accuracy" if name == "accuracy" else "accuracy per token"
    table = _table("held out" if step is None else f"after step {step:,}", "pairs", "loss", label, "95 %", "margin")
    for group in run.summaries[step]["groups"] if step is not None else ():
        accuracy = group[name]
        table.add_row(
            Text(printable(str(group["name"]))),
            f"{group['pairs']:,}",
            f"{group['loss']:.4f}",
            f"{accuracy['mean']:.3f}",
            f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
            f"{group['margin']['mean']:+.4f}",
        )
    return table


def _sparklines(run: RunFiles) -> Table:
    table = _table("metric", "first", "", "last")
    table.columns[2].justify = "left"
    metrics = [metric for name, *_, names in (*CURVES, *SPEED) for metric in (*names, *OF_TOKENS.get(name, ()))]
    for name in (prefix + metric for metric in metrics for prefix in ("", "eval/")):
        series = run.series.get(name)
        if series is not None and np.isfinite(series.values).any():
            table.add_row(name, f"{series.values[0]:.4g}", sparkline(series.values), f"{series.last:.4g}")
    return table


def sparkline(values: np.ndarray, width: int = WIDTH) -> str:
    """Return values as bars, scaled to their range.

    The values are divided into at most ``width`` parts, one per bar. Each bar shows the mean of the finite values in
    its part. A bar is blank if its part has no finite values.
    """
    parts = np.array_split(values, min(width, len(values)))
    means = np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])
    low, high = np.nanmin(means), np.nanmax(means)
    places = np.zeros_like(means) if high == low else (means - low) / (high - low) * (len(BARS) - 1)
    return "".join(" " if np.isnan(place) else BARS[int(round(place))] for place in places)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(printable(name), justify="right" if place else "left", overflow="fold")
    return table


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
