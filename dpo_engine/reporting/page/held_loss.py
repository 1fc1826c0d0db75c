"""Report what the held-out loss of a run shows: bad numbers, a loss above its initial value, and overfitting."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dpo_engine.reporting.page.finding import Finding, good, interval
from dpo_engine.reporting.page.measures import Measures, signed
from dpo_engine.reporting.page.run_files import RunFiles
from dpo_engine.wording import join

RISE = 0.02
"""If the held-out loss exceeds an earlier loss by more than this fraction, the loss has risen.

`overfitting` uses this fraction only if the paired difference of the losses, with its 95% interval, is unknown.
Otherwise, the loss has risen if the interval is above 0."""


def bad_numbers(run: RunFiles, m: Measures | None) -> Iterator[Finding]:
    """Report a held-out loss that is not a finite number in the newest evaluation."""
    held = run.series.get("eval/loss")
    if held is None or np.isfinite(held.last):
        return
    known = f"The findings about pairs describe step {m.step:,}." if m and m.step < held.steps[-1] else ""
    yield Finding(
        "bad",
        f"The held-out loss after step {held.steps[-1]:,} is not a finite number.",
        f"The model has probably diverged. {known}".strip(),
        "See log.txt for the first step with bad numbers; lower optim.lr, or set optim.clip_grad.",
        "loss",
    )


def start(run: RunFiles) -> Iterator[Finding]:
    """Report a held-out loss that exceeds the loss at the start by more than the fraction `RISE`.

    The loss at the start is the held-out loss before training or, if that is unknown, the first logged training loss.
    """
    held, train = run.series.get("eval/loss"), run.series.get("loss")
    first = held.values[0] if held is not None and held.steps[0] == 0 else train.values[0] if train else None
    if held is None or first is None or held.steps[-1] == 0 or not held.last > first * (1 + RISE):
        return
    yield Finding(
        "bad",
        "The held-out loss is higher than the loss at the start of training.",
        f"{first:.4f} at the start, {held.last:.4f} after step {held.steps[-1]:,}. Some pairs have large "
        "margins in the wrong direction.",
        "Lower optim.lr, raise loss.beta, or stop earlier.",
        "loss",
    )


def overfitting(run: RunFiles, m: Measures) -> Iterator[Finding]:
    """Report whether the held-out loss has risen since its minimum.

    With fewer than two evaluations, report that overfitting cannot be seen. With more evaluations, yield nothing if the
    newest loss is not finite.
    """
    held = run.series.get("eval/loss")
    if held is None or len(held.values) < 2:
        title = "There are fewer than two evaluations, so overfitting cannot be seen."
        yield Finding("note", title, "See metrics.jsonl.", more_evaluations(run), "loss")
        return
    if not np.isfinite(held.last):
        return
    best = int(np.nanargmin(held.values))
    step, low, last = int(held.steps[best]), float(held.values[best]), held.last
    if best == len(held.values) - 1:
        title = f"No overfitting so far: the held-out loss is lowest at the last evaluation, after step {step:,}."
        evidence = f"{held.values[0]:.4f} at the first evaluation, {last:.4f} now."
        yield Finding(good(m), title, evidence, "", "loss")
        return
    # If the pairs of the newest evaluation cannot be read, `m` describes an older evaluation, whose losses
    # are not the newest ones. In this case, the fraction `RISE` decides.
    rise = m.loss_rise(step) if m.step == held.steps[-1] else None
    clear = rise.low > 0 if rise else last > low * (1 + RISE)
    evidence = f"Held-out loss {low:.4f} after step {step:,}, {last:.4f} after step {held.steps[-1]:,}"
    evidence += f"; paired difference {signed(rise.mean)}, {interval(rise, 'nats')}." if rise else "."
    if not clear:
        title = f"No clear overfitting: the held-out loss has not clearly risen since step {step:,}."
        yield Finding("note", title, evidence, "", "loss")
        return
    title = f"Overfitting since step {step:,}: the held-out loss rises."
    yield Finding("warn", title, evidence, _use(run, step), "loss")


def _use(run: RunFiles, step: int) -> str:
    """Return advice against overfitting, such as how to use or keep the checkpoint of the best step."""
    if step in run.kept:
        use = f"Use the checkpoint of step {step:,} (`export --step {step}`)"
        return f"{use}, train for fewer steps, or lower optim.lr."
    if step == 0:
        return "Step 0 is the model before training. Train for fewer steps, or lower optim.lr."
    several = len(run.kept) > 1
    known = f"; only step{'s' * several} {join(run.kept, 'and')}" if run.kept else ", and no other step"
    known += " have one" if several else " has one"
    return (
        f"Step {step:,} has no checkpoint{known}. Train for fewer steps, or lower optim.lr. To keep the checkpoint of "
        "the best step in the next run, set checkpoint.keep_best={metric: eval/loss}."
    )


def more_evaluations(run: RunFiles) -> str:
    """Advise how to get more evaluations of a run.

    The text is empty if evaluations are configured, and the run is still in progress.
    """
    every = run.get("train.eval_interval")
    pairs = run.get("data.validation") or run.get("data.validation_fraction")
    if not pairs or not every:
        missing = ["train.eval_interval"] * (not every)
        return f"Set {', and '.join(['data.validation or data.validation_fraction'] * (not pairs) + missing)}."
    return "" if run.running else "Set a smaller train.eval_interval."
