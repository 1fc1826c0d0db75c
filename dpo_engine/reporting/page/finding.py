"""A finding of the verdict, and the constants and functions that the modules about findings share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_engine.reporting.intervals import Estimate
from dpo_engine.reporting.page.measures import Measures, percent, signed

DRIFT = 2.0
"""Mean absolute change of log-probabilities, in nats per token, above which a policy is far from the reference."""
MORE = "Check the data with `dpo-engine inspect`; then train longer or with a higher optim.lr, or evaluate more pairs."
Kind = Literal["good", "warn", "bad", "note"]


@dataclass(frozen=True)
class Finding:
    """A sentence about a run, with its evidence and advice.

    kind      ``good``, ``warn``, ``bad``, or ``note`` for a neutral sentence
    title     the sentence
    evidence  the numbers on which the sentence is based
    advice    what the user can do about a problem; empty if there is nothing to do
    chart     id of the chart on the page that shows the evidence; empty if there is no such chart
    """

    kind: Kind
    title: str
    evidence: str
    advice: str = ""
    chart: str = ""


def interval(estimate: Estimate, form: str = "percent") -> str:
    """Return the interval of an estimate as text."""
    show = percent if form == "percent" else signed
    return f"95% interval {show(estimate.low)} to {show(estimate.high)}"


def points(estimate: Estimate) -> str:
    """Return a difference of shares, with its interval, in percentage points."""
    mean, low, high = (signed(100 * value, 1) for value in estimate)
    return f"difference {mean} points, 95% interval {low} to {high}"


def good(m: Measures) -> Kind:
    """Return ``good``, or ``note`` if the policy is so far from the reference that a good number means little."""
    return "note" if m.has_reference and m.drift > DRIFT else "good"
