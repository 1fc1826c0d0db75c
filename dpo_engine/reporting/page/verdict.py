"""Describe in plain sentences what a run has learned, with the evidence for each sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dpo_engine.reporting.page import held_loss, reference_free
from dpo_engine.reporting.page.finding import DRIFT, MORE, Finding, good, interval, points
from dpo_engine.reporting.page.measures import Group, Measures, pairs_text, percent, signed
from dpo_engine.reporting.page.run_files import RunFiles

SMALLEST_GROUP = 10
"""Smallest number of pairs for judging a source.

It is also the smallest number of logged steps for the finding that compares the accuracies of training and held-out
pairs. The finding about the gradient norm needs twice as many logged steps."""
GAP = 0.1
"""Two findings need a difference of accuracies above this value.

The first finding is that the model fits training pairs better than held-out pairs. The second finding is that length
explains part of the accuracy. It needs a higher accuracy on pairs for which the length rule (such as "the longer
response is better") is right than on pairs for which the rule is wrong."""
OVERCONFIDENT = 0.05
"""Smallest reported difference between mean confidence and accuracy."""
SPIKE = 10.0
"""A gradient norm counts as a spike if it is larger than the run's median times this factor."""


def findings(run: RunFiles, measures: Measures | None) -> list[Finding]:
    """Return the findings about a run, the most important first.

    measures  measures of the run's newest readable evaluation; None if the run has no such evaluation
    """
    found = [*_ended(run), *held_loss.bad_numbers(run, measures)]
    if measures is None:
        found.append(
            Finding(
                "note",
                "No results on held-out pairs can be read, so it is unknown whether the model got better.",
                "The directory has no readable file eval/step_N.parquet.",
                held_loss.more_evaluations(run),
            )
        )
        return [*found, *_health(run)]
    if measures.step == 0:
        return [*found, _untrained(measures), *_health(run)]
    held = run.series.get("eval/loss")
    told = [_outcome(measures), *_ranking(measures), *held_loss.start(run), *_displacement(measures)]
    told += [*_drift(measures), *held_loss.overfitting(run, measures), *_gap(run, measures), _length(measures)]
    told += [*_sources(measures), *_calibration(measures)]
    if held is not None and not (measures.step >= held.steps[-1] and np.isfinite(held.last)):
        # A good number means little if it is from an older evaluation, or if the newest held-out loss is not finite.
        told = [replace(one, kind="note") if one.kind == "good" else one for one in told]
    return [*found, *told, *_health(run)]


def _ended(run: RunFiles) -> Iterator[Finding]:
    if run.ended:
        yield Finding("bad", "The last time the run was started, it ended with an error.", run.ended, "See log.txt.")


def _untrained(m: Measures) -> Finding:
    """Describe an evaluation before training, in which policy and reference are usually equal."""
    title = "Not trained yet: the newest evaluation is from before the first step."
    share = f"On held-out pairs, chosen responses are more likely than rejected ones in {percent(m.policy_ranking)}"
    return Finding("note", title, f"{share} of {pairs_text(m.count)}.", "", "held")


def _outcome(m: Measures) -> Finding:
    if not m.has_reference:
        return reference_free.outcome(m)
    estimate = m.accuracy
    share = percent(estimate.mean)
    margin = f"mean reward margin {signed(m.margin.mean)}"
    evidence = f"Reward accuracy after step {m.step:,}: {share}, {interval(estimate)}; {margin}; 50% means no change."
    if estimate.low > 0.5 and m.drift > DRIFT:
        accuracy = f"accuracy {share} on {pairs_text(m.count)}"
        title = f"Better on held-out pairs ({accuracy}), but the policy is very far from the reference."
        advice = "Read generations before you trust the accuracy, which does not evaluate what the model writes."
        return Finding("warn", title, evidence, advice, "accuracy")
    if estimate.low > 0.5:
        title = f"Better on held-out pairs: in {share} of {pairs_text(m.count)}, the model {MORE_THAN}."
        return Finding("good", title, evidence, chart="accuracy")
    if estimate.high < 0.5:
        title = f"Worse on held-out pairs: in only {share} of {pairs_text(m.count)}, the model {MORE_THAN}."
        return Finding("bad", title, evidence, MORE, "accuracy")
    title = "No clear change on held-out pairs: the interval of the reward accuracy contains 50%."
    return Finding("warn", title, evidence, MORE, "accuracy")


MORE_THAN = "prefers the chosen response more than the reference does"


def _ranking(m: Measures) -> Iterator[Finding]:
    """Compare the shares of pairs that the policy and the reference rank correctly by likelihood."""
    if not m.has_reference:
        return
    gain, before, after = m.ranking_gain, percent(m.reference_ranking), percent(m.policy_ranking)
    evidence = (
        f"Chosen more likely than rejected: {before} under the reference, {after} under the policy; "
        f"{points(gain)}. {pairs_text(m.to_right)} became right, {m.to_wrong:,} became wrong."
    )
    if gain.low > 0:
        yield Finding(
            "good", f"The policy ranks more pairs correctly by likelihood: {before} → {after}.", evidence, "", "flip"
        )
    elif gain.high < 0:
        advice = "Look at the pairs that became wrong; lower optim.lr or raise loss.beta."
        title = f"The policy ranks fewer pairs correctly by likelihood: {before} → {after}."
        yield Finding("bad", title, evidence, advice, "flip")
    else:
        title = f"No clear change in the share of pairs ranked correctly by likelihood: {before} → {after}."
        yield Finding("note", title, evidence, "", "flip")


def _displacement(m: Measures) -> Iterator[Finding]:
    """Report how the likelihoods of chosen and of rejected responses contributed to the change of the margins."""
    if not m.has_reference:
        return
    chosen, rejected, fell = m.chosen_change, m.rejected_change, m.chosen_fell
    evidence = (
        f"Mean change of the log-probability: chosen {signed(chosen.mean)} nats ({interval(chosen, 'nats')}), rejected "
        f"{signed(rejected.mean)} nats. Chosen responses became less likely in {percent(fell.mean)} of the pairs "
        f"({interval(fell)})."
    )
    if chosen.high < 0:
        both = (
            "but rejected ones lost more likelihood"
            if rejected.mean < chosen.mean
            else "and rejected ones did not lose more likelihood"
        )
        yield Finding(
            "warn",
            f"Chosen responses became less likely in {percent(fell.mean)} of the pairs, {both}.",
            evidence,
            "Some decrease is normal for DPO. If generations got worse: lower optim.lr, raise loss.beta, add a "
            "likelihood term (loss.name=mix with sft), or remove pairs whose responses are nearly equal.",
            "displacement",
        )
    elif chosen.low > 0 and rejected.high < 0:
        title = "Margins grew from both sides: chosen responses became more likely, and rejected ones less likely."
        yield Finding("good", title, evidence, "", "displacement")
    elif chosen.low > 0:
        title = "Chosen responses became more likely; rejected ones did not become less likely."
        yield Finding("note", title, evidence, "", "displacement")
    else:
        yield Finding("note", "No clear change in the likelihood of chosen responses.", evidence, "", "displacement")


def _drift(m: Measures) -> Iterator[Finding]:
    """Report a policy that has moved far from the reference."""
    if m.has_reference and m.drift > DRIFT:
        yield Finding(
            "warn",
            f"The log-probability of a token changed by {m.drift:.1f} nats on average.",
            f"Mean absolute change: {m.drift_of('chosen'):.1f} nats per token of chosen responses, "
            f"{m.drift_of('rejected'):.1f} per token of rejected ones. Beyond {DRIFT:g} nats, a response of a few "
            "tokens is thousands of times more or less likely than under the reference.",
            "Lower optim.lr, or raise loss.beta.",
        )


def _gap(run: RunFiles, m: Measures) -> Iterator[Finding]:
    train = run.series.get("loss_margin/accuracies" if m.compares_tokens else "rewards/accuracies")
    if train is None or len(train.values) < SMALLEST_GROUP:
        return
    recent = train.values[-max(SMALLEST_GROUP, len(train.values) // 10) :]
    if not np.isfinite(recent).any():
        return
    mean = float(np.nanmean(recent))
    if mean - m.accuracy.mean > GAP and mean > m.accuracy.high:
        yield Finding(
            "warn",
            f"The model fits training pairs better than held-out ones: accuracy {percent(mean)} against "
            f"{percent(m.accuracy.mean)}.",
            f"Mean of the last {len(recent):,} logged steps; held-out pairs: {interval(m.accuracy)}.",
            "More pairs, or more varied ones, help most; fewer epochs or a lower optim.lr also help.",
            "accuracy",
        )


def _length(m: Measures) -> Finding:
    """Report whether the lengths of the responses alone explain the accuracy."""
    with_rule, against = m.along_length, m.against_length
    if m.equal_lengths == m.count:
        title = "Both responses of every pair are equally long, so length explains nothing."
        return Finding("note", title, f"{m.count:,} pairs.", "", "length")
    rule = f"“the {m.length_rule} response is better” is right in {percent(m.length_accuracy)} of the pairs"
    if with_rule is None or against is None:
        title = "Length may or may not explain the accuracy: too few pairs follow the length rule, or too few break it."
        different = f"Different lengths: {pairs_text(m.count - m.equal_lengths)} of {m.count:,}."
        evidence = f"The rule {rule}; a pair with equally long responses counts as half right. {different}"
        return Finding("note", title, evidence, "", "length")
    evidence = (
        f"The rule {rule}. Where it is right, the accuracy is {percent(with_rule.mean)}; where it is wrong, "
        f"{percent(against.mean)} ({interval(against)})."
    )
    advice = "set loss.ld_alpha (unless the loss has a likelihood term), or balance the lengths."
    compare = "Compare per token (loss.name=simpo or ipo, or average: true), "
    advice = advice.capitalize() if m.per_token else compare + advice
    if against.high < 0.5 < with_rule.low:
        title = f"Length alone explains the accuracy: the model prefers the {m.length_rule} response."
        return Finding("bad", title, evidence, advice, "length")
    if against.high < with_rule.low and with_rule.mean - against.mean > GAP:
        title = f"Length explains part of the accuracy: the model prefers the {m.length_rule} response."
        return Finding("warn", title, evidence, advice, "length")
    return Finding("good", "Length alone does not explain the accuracy.", evidence, "", "length")


def _sources(m: Measures) -> Iterator[Finding]:
    if len(m.sources) < 2:
        return
    sources = short_names(m.sources)
    judged = {name: group for name, group in sources.items() if group.pairs >= SMALLEST_GROUP}
    worse = [name for name, group in judged.items() if group.accuracy.high < 0.5]
    evidence = "; ".join(
        f"{name}: {percent(group.accuracy.mean)} of {pairs_text(group.pairs)} ({interval(group.accuracy)})"
        for name, group in sorted(sources.items(), key=lambda item: item[1].accuracy.mean)[:8]
    )
    if not m.has_reference:  # 50% is no baseline
        title = f"Below 50% on {', '.join(worse)}." if worse else "No source is clearly below 50%."
        yield Finding("warn" if worse else "note", title, evidence + ".", "", "sources")
        return
    if worse:
        advice = "Check the labels of these sources; lower their weights, or remove them."
        if len(worse) == 1:
            advice = "Check the labels of this source; lower its weight, or remove it."
        yield Finding("bad", f"Worse on {', '.join(worse)}.", evidence + ".", advice, "sources")
        return
    lowest = min(judged, key=lambda name: judged[name].accuracy.mean, default=None)
    title = (
        f"No source got clearly worse; {lowest} has the lowest accuracy."
        if lowest
        else "Every source has too few pairs to be judged."
    )
    yield Finding("good" if lowest else "note", title, evidence + ".", "", "sources")


def short_names(sources: dict[str, Group]) -> dict[str, Group]:
    """Return the groups with the last component of each source's path as the key.

    If two last components are equal, the keys are the whole paths.
    """
    short = {name.rpartition("/")[2]: group for name, group in sources.items()}
    return short if len(short) == len(sources) else sources


def _calibration(m: Measures) -> Iterator[Finding]:
    gap = m.confidence - m.accuracy.mean
    evidence = (
        f"Mean confidence {percent(m.confidence)}, accuracy {percent(m.accuracy.mean)}; expected calibration error "
        f"{m.calibration_error:.3f}, Brier score {m.brier:.3f} (0.25 if every confidence is 50%)."
    )
    if gap > OVERCONFIDENT and m.confidence > m.accuracy.high:
        yield Finding(
            "warn",
            "The model is overconfident: its confidence exceeds its accuracy.",
            evidence,
            "Lower optim.lr, stop earlier, or smooth the labels (loss.label_smoothing).",
            "calibration",
        )
    elif gap < -OVERCONFIDENT and m.confidence < m.accuracy.low:
        title = "The model is underconfident: its accuracy exceeds its confidence, because margins are small."
        yield Finding("note", title, evidence, "", "calibration")
    else:
        title = "No clear difference between the model's confidence and its accuracy."
        yield Finding(good(m), title, evidence, "", "calibration")


def _health(run: RunFiles) -> Iterator[Finding]:
    skipped = run.series.get("skipped_steps")
    if skipped is not None and skipped.last > 0:
        evidence = f"{int(skipped.last)} of {skipped.steps[-1]} steps; log.txt names the pairs of the skipped steps."
        advice = "Lower optim.lr, or set optim.clip_grad."
        yield Finding("warn", "Steps were skipped because of bad numbers.", evidence, advice)
    norm = run.series.get("grad_norm")
    if norm is not None and np.isfinite(norm.values).sum() >= 2 * SMALLEST_GROUP:
        middle, place = float(np.nanmedian(norm.values)), int(np.nanargmax(norm.values))
        if norm.values[place] > SPIKE * middle > 0:
            evidence = f"{norm.values[place]:.3g} at step {norm.steps[place]}; the median is {middle:.3g}."
            advice = "Look at this step's pairs; a longer warmup or a lower optim.clip_grad limits the spike's effect."
            yield Finding("note", "The gradient norm has a spike.", evidence, advice, "grad_norm")
