"""Report what a run without a reference has learned.

The newest evaluation is compared with the first one, because 50% is no baseline for such a run.
"""

from __future__ import annotations

from dpo_engine.reporting.page.finding import MORE, Finding, interval, points
from dpo_engine.reporting.page.measures import Measures, pairs_text, percent, signed


def outcome(m: Measures) -> Finding:
    """Return the finding about the accuracy of a run whose newest evaluation has no reference log-probabilities."""
    estimate, change = m.accuracy, m.since_first
    likely = f"the chosen response is more likely{' per token' if m.compares_tokens else ''}"
    share = f"{likely} in {percent(estimate.mean)} of {pairs_text(m.count)}"
    by = "per token (as in the loss)" if m.compares_tokens else "of whole responses"
    evidence = f"Log-probabilities {by} are compared. After step {m.step:,}: {interval(estimate)}"
    margin = f"mean {m.margin_name} {signed(m.margin.mean)}"
    if change is None:
        evidence += f"; {margin}. The run has no reference, so 50% is no baseline. "
        evidence += "No earlier evaluation of the same pairs is known."
        advice = "Set train.eval_at_start, so that the model is also evaluated before training."
        return Finding("note", f"On held-out pairs, {share}.", evidence, advice, "held")
    when = "before training" if change.step == 0 else f"after step {change.step:,}"
    evidence += f"; {points(change.difference)}; {margin}. The run has no reference, so 50% is no baseline."
    share += f", compared with {percent(change.before)} {when}."
    if change.difference.low > 0:
        return Finding("good", f"Better on held-out pairs: {share}", evidence, "", "held")
    if change.difference.high < 0:
        return Finding("bad", f"Worse on held-out pairs: {share}", evidence, MORE, "held")
    return Finding("warn", f"No clear change on held-out pairs: {share}", evidence, MORE, "held")
