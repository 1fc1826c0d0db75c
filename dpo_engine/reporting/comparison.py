"""Summarize an evaluation, or compare two evaluations pair by pair; print the results as tables for the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_engine.errors import DataError, printable
from dpo_engine.reporting.intervals import CONFIDENCE, DIFFERENCE, RESAMPLES, SEED, SHARE, estimates, sign_test
from dpo_engine.reporting.pair_file import Evaluation

LENGTH_EDGES = (16, 64, 256, 1024, 4096)
"""Upper bounds (inclusive) of the length groups, in tokens of a pair's longer response.

The bounds do not depend on the data, so that reports on different data can be compared."""
UNITS = ("loss", "reference")
"""Keys of :attr:`Evaluation.facts` that determine the scale of rewards."""


MEASURES = ("accuracy", "margin", "likelihood_accuracy", "likelihood_accuracy_per_token")
"""Measures that a report gives with confidence intervals. The likelihood accuracies do not involve the reference."""
SHARES = ("accuracy", "likelihood_accuracy", "likelihood_accuracy_per_token")
"""The measures that are fractions of pairs."""


def _measures(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the values of all :data:`MEASURES`, [n] each, with one element per pair.

    The likelihood accuracies compare the log-probabilities of both responses, in total or per token. They are 1 if the
    chosen response has the larger value, 0.5 for a tie, and 0 if the rejected response has the larger value.
    """
    chosen, rejected = columns["chosen_logps"], columns["rejected_logps"]
    per_token = chosen / np.maximum(columns["chosen_tokens"], 1), rejected / np.maximum(columns["rejected_tokens"], 1)
    likelihood = (0.5 * (1 + np.sign(first - second)) for first, second in ((chosen, rejected), per_token))
    return dict(zip(MEASURES, (columns["accuracy"], columns["margin"], *likelihood), strict=True))


def report(evaluation: Evaluation) -> dict[str, Any]:
    """Compute means and confidence intervals over all pairs, and over groups of pairs.

    Pairs are grouped by the length of the longer response and, if there are several sources, also by source.

    Returns  a dictionary: ``run`` (the evaluation's facts), ``interval`` (how intervals are computed), and ``groups``
             (a list of dictionaries, one per group). A group has the keys ``by`` (``all``, ``source`` or ``length``),
             ``name``, ``pairs``, ``prompts``, ``loss``, and the names in :data:`MEASURES`. The value of a measure is a
             dictionary with ``mean``, ``low``, and ``high``
    """
    columns = evaluation.columns | _measures(evaluation.columns)
    groups = [{"by": by, "name": name, **_means(columns, rows)} for by, name, rows in _groups(columns)]
    interval = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "drawn": "prompts"}
    return {"run": evaluation.facts, "interval": interval, "groups": groups}


def _groups(columns: dict[str, np.ndarray]) -> Iterator[tuple[str, str, np.ndarray]]:
    yield "all", "all pairs", np.ones(len(columns["id"]), dtype=bool)
    sources = list(dict.fromkeys(columns["source"].tolist()))
    for source in sources if len(sources) > 1 else ():
        yield "source", source, columns["source"] == source
    longer = np.maximum(columns["chosen_tokens"], columns["rejected_tokens"])
    bucket = np.searchsorted(LENGTH_EDGES, longer)
    for place in np.unique(bucket):
        first = LENGTH_EDGES[place - 1] + 1 if place else 1
        last = f" to {LENGTH_EDGES[place]}" if place < len(LENGTH_EDGES) else " or more"
        yield "length", f"{first}{last} tokens", bucket == place


def _means(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
    values = np.stack([columns[name][rows] for name in ("loss", *MEASURES)], axis=1)
    prompts = columns["prompt_id"][rows]
    centers = [SHARE if name in SHARES else None for name in ("loss", *MEASURES)]
    loss, *found = estimates(values, columns["weight"][rows], prompts, centers=centers)
    return {
        "pairs": len(values),
        "prompts": len(set(prompts.tolist())),
        "loss": loss.mean,
        **{name: estimate._asdict() for name, estimate in zip(MEASURES, found, strict=True)},
    }


def compare(first: Evaluation, second: Evaluation, *, names: tuple[str, str]) -> dict[str, Any]:
    """Compare two evaluations on the pairs that both contain. Differences are `first` minus `second`.

    The interval of a difference is computed from the per-pair differences between the two evaluations.

    If a pair occurs k times in one evaluation and m times in the other, it counts min(k, m) times. Weights are taken
    from `first`. Each evaluation ranks a pair in one of three ways, from best to worst: correctly, as a tie, or
    wrongly. A pair is won if `first` ranks it better than `second`, and lost if `first` ranks it worse.

    names  names of the two evaluations, for messages

    Returns  a dictionary: ``names``; ``steps``; ``common`` (number of pairs that both evaluations contain); ``only``
             (for each evaluation, the number of pairs that the other evaluation does not contain); ``other_weights``
             (number of common pairs whose weights differ); ``won``, ``lost``, ``tied`` (numbers of pairs);
             ``sign_test`` (p-value of a sign test of the accuracies, by prompt); ``other_units`` (names of the facts
             in :data:`UNITS` that differ; if any differ, margins cannot be compared); and the names in
             :data:`MEASURES`. The value of a measure is a dictionary: ``first`` and ``second`` (the means of the two
             evaluations), ``mean`` (the difference of these means), ``low`` and ``high`` (the bounds of the
             difference's confidence interval)

    Raises :class:`DataError` if the evaluations have no pair in common.
    """
    one, two = matched(first, second, names=names)
    better = np.sign(one["accuracy"] - two["accuracy"])
    mine, others = _measures(one), _measures(two)
    differences = np.stack([mine[name] - others[name] for name in MEASURES], axis=1)
    values = np.stack([part[name] for name in MEASURES for part in (mine, others)], axis=1)
    centers = [None] * values.shape[1] + [DIFFERENCE if name in SHARES else None for name in MEASURES]
    weights, prompts = one["weight"], one["prompt_id"]
    found = estimates(np.concatenate([values, differences], axis=1), weights, prompts, centers=centers)
    means, compared = found[: 2 * len(MEASURES)], found[2 * len(MEASURES) :]

    common = len(better)
    return {
        "names": list(names),
        "steps": [evaluation.facts.get("step") for evaluation in (first, second)],
        "common": common,
        "only": [len(first) - common, len(second) - common],
        "other_weights": int((one["weight"] != two["weight"]).sum()),
        "won": int((better > 0).sum()),
        "lost": int((better < 0).sum()),
        "tied": int((better == 0).sum()),
        "sign_test": sign_test(one["accuracy"] - two["accuracy"], weights, prompts),
        "other_units": [name for name in UNITS if first.facts.get(name) != second.facts.get(name)],
        **{
            name: {"first": means[2 * i].mean, "second": means[2 * i + 1].mean, **compared[i]._asdict()}
            for i, name in enumerate(MEASURES)
        },
    }


def matched(
    first: Evaluation, second: Evaluation, *, names: tuple[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the columns of both evaluations for the pairs that both contain, in the order of `first`.

    If a pair occurs k times in one evaluation and m times in the other, it occurs min(k, m) times.

    Raises :class:`DataError` if the evaluations have no pair in common.
    """
    there = {key: row for row, key in enumerate(_occurrences(second.columns["id"].tolist()))}
    keys = list(_occurrences(first.columns["id"].tolist()))
    rows = [(row, there[key]) for row, key in enumerate(keys) if key in there]
    if not rows:
        raise DataError(
            f"{names[0]} and {names[1]}: have no pair in common; pairs are matched by token ids, so evaluate both "
            "with the same records, tokenizer and length limits"
        )
    return tuple(
        {name: column[list(places)] for name, column in evaluation.columns.items()}
        for evaluation, places in zip((first, second), zip(*rows, strict=True), strict=True)
    )


def _occurrences(ids: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield each ID with the number of its earlier occurrences."""
    seen: Counter[str] = Counter()
    for name in ids:
        yield name, seen[name]
        seen[name] += 1


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report that :func:`report` returned."""
    run = report["run"]
    reference = "no reference" if run["reference"] is None else f"reference {run['reference']}"
    options = "".join(f", {name} {value}" for name, value in run["loss"].items() if name != "name")
    _say(console, f"step {run['step']}: loss {run['loss']['name']}{options}; {reference}")
    table = _table("", "pairs", "loss", "accuracy", "95 %", "margin", "95 %")
    for group in report["groups"]:
        name = group["name"] if group["by"] != "length" else f"longer response {group['name']}"
        accuracy, margin = group["accuracy"], group["margin"]
        table.add_row(
            Text(printable(name)),  # rich prints a Text unchanged, even if a path in it looks like markup
            f"{group['pairs']:,}",
            f"{group['loss']:.4f}",
            f"{accuracy['mean']:.3f}",
            f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
            f"{margin['mean']:+.4f}",
            f"{margin['low']:+.4f} to {margin['high']:+.4f}",
        )
    console.print(table)
    total, per_token = (
        "{mean:.3f} ({low:.3f} to {high:.3f})".format(**report["groups"][0][name]) for name in MEASURES[2:]
    )
    _say(console, f"likelihood accuracy (chosen more likely than rejected): {total}; per token {per_token}")
    _say(
        console,
        f"intervals: {RESAMPLES:,} bootstrap resamples of prompts, seed {SEED}; for accuracies, widened to contain the "
        "exact (Clopper-Pearson) intervals; means are weighted",
    )


def show_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print a comparison that :func:`compare` returned."""
    (first, second), (step, other_step), only = (comparison[name] for name in ("names", "steps", "only"))
    _say(console, f"first:  {first} (step {step})")
    _say(console, f"second: {second} (step {other_step})")
    _say(
        console,
        f"{_pairs(comparison['common'])} in common, {only[0]:,} only in the first, {only[1]:,} only in the second",
    )
    table = _table("", "first", "second", "difference", "95 %")
    for name in MEASURES:
        form = "{:+.4f}" if name == "margin" else "{:+.3f}"
        measure = {key: form.format(value) for key, value in comparison[name].items()}
        ends = f"{measure['low']} to {measure['high']}"
        table.add_row(name.replace("_", " "), measure["first"], measure["second"], measure["mean"], ends)
    console.print(table)
    _say(
        console,
        f"pairs that the first evaluation ranks better: {comparison['won']:,}, worse: {comparison['lost']:,}, equally "
        f"well: {comparison['tied']:,}; sign test of prompts: p = {comparison['sign_test']:.3g}",
    )
    _say(
        console,
        f"intervals: {RESAMPLES:,} paired resamples of prompts; for accuracies, widened to contain the exact "
        "(Clopper-Pearson) intervals",
    )
    if comparison["other_units"]:
        what = " and ".join(comparison["other_units"])
        _say(console, f"the two evaluations differ in {what}, so their margins have different units")
    if comparison["other_weights"]:
        _say(
            console,
            f"weights differ between the two evaluations for {_pairs(comparison['other_weights'])}; the weights of "
            "the first evaluation are used",
        )


def _pairs(count: int) -> str:
    return f"{count:,} pair{'' if count == 1 else 's'}"


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
