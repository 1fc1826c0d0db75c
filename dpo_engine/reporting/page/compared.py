"""Compare two runs on the page: a sentence, a table of differences, and the pairs that the runs rank differently."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dpo_engine.errors import DataError
from dpo_engine.reporting.comparison import SHARES, compare, matched
from dpo_engine.reporting.intervals import Estimate, estimates
from dpo_engine.reporting.page.charts import Judged
from dpo_engine.reporting.page.finding import DRIFT
from dpo_engine.reporting.page.measures import signed
from dpo_engine.reporting.page.pair_table import judged_differently

CHOSEN, DISTANCE, LOSS = "chosen, change in nats", "distance, nats per token", "held-out loss"
NAMES = {
    "accuracy": "reward accuracy",
    "margin": "reward margin",
    "likelihood_accuracy": "likelihood accuracy",
    "likelihood_accuracy_per_token": "likelihood accuracy per token",
}


class Row(NamedTuple):
    """A row of the table: a name, the mean of the second run (``later``), the mean of the first, and the difference."""

    name: str
    later: float
    first: float
    difference: Estimate

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


def comparison(first: Judged, second: Judged) -> dict[str, Any]:
    """Compare the newest evaluations of two runs. Differences are ``second`` minus ``first``.

    Returns  a dictionary: ``found`` (the result of :func:`~dpo_engine.reporting.comparison.compare`, or None);
             ``problem`` (why ``found`` is None, or a limitation of the result; None if there is no problem); ``names``
             (of the second and of the first run); ``summary`` (a sentence); ``rows`` (of the table); ``differently``
             (at most 50 pairs that the runs rank differently); and ``number`` (the number of all pairs that the
             runs rank differently)
    """
    names = (second.run.name, first.run.name)
    told: dict[str, Any] = {"names": names, "found": None, "problem": None, "summary": "", "rows": []}
    told |= {"differently": [], "number": 0}
    if first.measures is None or second.measures is None:
        return told | {"problem": "one of the runs has no evaluation, so the runs cannot be compared pair by pair"}
    later, before = second.measures.evaluation, first.measures.evaluation
    try:
        found = compare(later, before, names=names)
    except DataError:
        return told | {"problem": "the runs were evaluated on different held-out pairs, so no pair can be compared"}
    if sum(found["only"]):
        told["problem"] = (
            "only some held-out pairs are the same in both runs, and only these pairs are compared: "
            f"{found['common']:,} in common, {found['only'][0]:,} only in {names[0]}, {found['only'][1]:,} only in "
            f"{names[1]}"
        )
    rows = [
        Row(NAMES[name], part["first"], part["second"], Estimate(*(part[key] for key in Estimate._fields)))
        for name, part in ((name, found[name]) for name in (*SHARES[:1], "margin", *SHARES[1:]))
    ]
    rows += _more_rows(*matched(later, before, names=names), same_loss="loss" not in found["other_units"])
    differently, number = judged_differently(first, second)
    same_reference = "reference" not in found["other_units"]
    if not same_reference:
        rows.insert(0, rows.pop([row.name for row in rows].index(NAMES["likelihood_accuracy"])))
    summary = _summary({row.name: row for row in rows}, *names, same_reference=same_reference)
    return told | {"found": found, "summary": summary, "rows": rows, "differently": differently, "number": number}


def _more_rows(later: dict[str, np.ndarray], first: dict[str, np.ndarray], same_loss: bool) -> list[Row]:
    """Return further rows: displacement and distance if both runs have a reference, and the loss if ``same_loss``."""
    both = [_moved(later), _moved(first)]
    if not all(np.isfinite(values).all() for part in both for values in part.values()):
        both = [{}, {}]
    if same_loss:
        both = [part | {LOSS: columns["loss"]} for part, columns in zip(both, (later, first), strict=True)]
    if not both[0]:
        return []
    ours, theirs = (np.stack(list(part.values()), axis=1) for part in both)
    found = estimates(np.concatenate([ours, theirs, ours - theirs], axis=1), first["weight"], first["prompt_id"])
    count = len(both[0])
    return [Row(name, found[i].mean, found[count + i].mean, found[2 * count + i]) for i, name in enumerate(both[0])]


def _moved(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return, for each pair, the log-probability changes of both responses, and the distance.

    A change is the log-probability under the policy minus that under the reference. The distance is the sum of both
    absolute changes, divided by the number of tokens of both responses.
    """
    chosen, rejected = (columns[f"{side}_logps"] - columns[f"ref_{side}_logps"] for side in ("chosen", "rejected"))
    tokens = columns["chosen_tokens"] + columns["rejected_tokens"]
    distance = (abs(chosen) + abs(rejected)) / tokens
    return {CHOSEN: chosen, "rejected, change in nats": rejected, DISTANCE: distance}


def _summary(rows: dict[str, Row], later: str, first: str, *, same_reference: bool) -> str:
    """Return one sentence that compares the runs.

    The sentence always gives the difference in accuracy. It mentions the log-probability of chosen responses, and the
    held-out loss, only if the interval of the difference between the runs excludes 0. It mentions the distance from the
    reference only if the distance of the run ``later`` exceeds `DRIFT`.

    same_reference   whether the reward accuracies of both runs have the same meaning; if not, the sentence is about the
                     likelihood accuracies
    """
    accuracy = rows[NAMES["accuracy" if same_reference else "likelihood_accuracy"]]
    gain = f"{signed(100 * accuracy.difference.mean, 1)} points of {accuracy.name}"
    if not accuracy.clear:
        gain += ", which is no clear difference"
    if not same_reference:
        per_token = rows[NAMES["likelihood_accuracy_per_token"]]
        gain += f" (per token: {signed(100 * per_token.difference.mean, 1)} points"
        gain += "; the runs differ in the reference, so their reward accuracies have different meanings)"
    bad, other = [], []
    chosen, distance, loss = (rows.get(name) for name in (CHOSEN, DISTANCE, LOSS))
    if chosen and chosen.clear:
        fell = chosen.difference.mean < 0
        size = f"{abs(chosen.difference.mean):.2f} nats compared with {first}"
        (bad if fell else other).append(f"chosen responses became {'less' if fell else 'more'} likely by {size}")
    if distance and distance.later > DRIFT:
        words = (
            f"the policy is very far from the reference ({distance.later:.1f} nats per token; {first}: "
            f"{distance.first:.1f})"
        )
        bad.append(words)
    if loss and loss.clear:
        rose = loss.difference.mean > 0
        words = f"the held-out loss is {'higher' if rose else 'lower'} by {abs(loss.difference.mean):.3g}"
        (bad if rose else other).append(words)
    parts = [gain, *other] if accuracy.difference.mean >= 0 else [gain, *bad]
    against = bad if accuracy.difference.mean >= 0 else other
    return f"{later}: {'; '.join(parts)}" + (f"; but {', and '.join(against)}" if against else "") + "."
