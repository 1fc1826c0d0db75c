"""Tests of the findings about runs. The runs are made up, and the expected numbers are computed independently."""

import dataclasses
import math

import numpy as np
import pytest

from dpo_engine.reporting.page.charts import best_step
from dpo_engine.reporting.page.measures import Measures
from dpo_engine.reporting.page.run_files import RunFiles, Series
from dpo_engine.reporting.page.verdict import findings
from support.evaluations import evaluation


def series(*values, start=1):
    return Series(np.arange(start, start + len(values)), np.array(values, dtype=float))


def run_of(found=None, tmp_path="x", **metrics):
    names = {name.replace("__", "/"): values for name, values in metrics.items()}
    return RunFiles(tmp_path, "run", series=names, evaluation=found)


def verdict(found, earlier=None, **metrics):
    """Return a dictionary of the findings, with their titles as keys."""
    measures = Measures(found, lambda step: earlier) if found else None
    return {one.title: one for one in findings(run_of(found, **metrics), measures)}


def one(found, start):
    (match,) = [finding for title, finding in found.items() if title.startswith(start)]
    return match


def test_better_worse_and_unclear():
    assert (
        one(verdict(evaluation([1.0] * 90 + [-1.0] * 10)), "Better on held-out pairs: in 90.0% of 100 pairs").kind
        == "good"
    )
    assert (
        one(verdict(evaluation([1.0] * 10 + [-1.0] * 90)), "Worse on held-out pairs: in only 10.0% of 100 pairs").kind
        == "bad"
    )
    says = "prefers the chosen response more than the reference does."
    both_fell = evaluation([1.0] * 30, chosen_logps=[-6.0] * 30, rejected_logps=[-7.0] * 30)
    assert one(verdict(both_fell), "Better on held-out pairs").title.endswith(says), (
        "the title must not change if chosen responses became less likely"
    )
    assert one(verdict(evaluation([-1.0] * 30)), "Worse on held-out pairs").title.endswith(says)
    # If 255 of 255 pairs are correct, the exact lower bound of the accuracy is the number whose 255th power is 2.5%.
    exact = 100 * 0.025 ** (1 / 255)
    assert (
        f"interval {exact:.1f}% to 100.0%" in one(verdict(evaluation([1.0] * 255)), "Better on held-out pairs").evidence
    )
    unclear = one(verdict(evaluation([1.0] * 50 + [-1.0] * 50)), "No clear change on held-out pairs")
    # For a share of one half, compute the interval with the normal approximation.
    half = 1.96 * math.sqrt(0.25 / 100)
    low, high = (float(part.split("%")[0]) for part in unclear.evidence.partition("interval ")[2].split(" to "))
    assert unclear.kind == "warn" and low == pytest.approx(100 * (0.5 - half), abs=1.5)
    assert high == pytest.approx(100 * (0.5 + half), abs=1.5)


def free(right, tokens, step, count=40, **more):
    """Return an evaluation without a reference.

    Every chosen response has 2 tokens. Every rejected response has ``tokens`` tokens; ``tokens`` must be at least 3.
    The chosen response has the higher log-probability per token in the first ``right`` pairs, and the higher
    log-probability of the whole response in all pairs.
    """
    each = np.where(np.arange(count) < right, -1.0, -2.0)
    chosen, rejected = 2 * each, np.full(count, -1.5 * tokens)
    lengths = {"chosen_tokens": [2] * count, "rejected_tokens": [tokens] * count}
    logps = {"chosen_logps": chosen, "rejected_logps": rejected, "ref_chosen_logps": [math.nan] * count}
    rewards = {"chosen_rewards": 0.1 * chosen, "rejected_rewards": 0.1 * rejected}
    return evaluation(0.1 * (chosen - rejected), facts={"step": step}, **lengths, **logps, **rewards, **more)


def first(found, earlier=None, per_token=True, start=0):
    """Return the findings about a run without a reference.

    found    newest evaluation of the run
    earlier  first evaluation of the run, made after step ``start``; None: the first evaluation cannot be read
    """
    measures = Measures(found, lambda step: earlier if step == start else None, start, per_token)
    return {one.title: one for one in findings(run_of(found), measures)}


def test_without_a_reference_the_first_evaluation_is_the_baseline():
    better = first(free(36, 9, 20), free(18, 9, 0))
    told = one(
        better, "Better on held-out pairs: the chosen response is more likely per token in 90.0% of 40 pairs, compared "
    )
    assert told.kind == "good" and told.title.endswith("with 45.0% before training.")
    assert "difference +45.0 points" in told.evidence and "mean reward margin per token +0.040" in told.evidence
    fell = one(first(free(26, 9, 20), free(37, 9, 5), start=5), "Worse on held-out pairs: the chosen response")
    assert fell.kind == "bad" and fell.title.endswith("65.0% of 40 pairs, compared with 92.5% after step 5.")
    assert one(first(free(26, 9, 20), free(25, 9, 0)), "No clear change on held-out pairs").kind == "warn"
    alone = one(
        first(free(36, 9, 20)), "On held-out pairs, the chosen response is more likely per token in 90.0% of 40 pairs."
    )
    assert alone.kind == "note" and "train.eval_at_start" in alone.advice
    others = free(18, 9, 0, ids=[f"{i:032x}" for i in range(100, 140)])
    assert one(first(free(36, 9, 20), others), "On held-out pairs").kind == "note"
    whole = one(
        first(free(18, 9, 20), free(18, 9, 0), per_token=False),
        "No clear change on held-out pairs: the chosen response is",
    )
    assert "more likely in 100.0% of 40 pairs" in whole.title and "of whole responses" in whole.evidence
    assert not any("likelihood" in title or "Chosen" in title for title in better)


def test_without_a_reference_length_and_sources_are_judged_per_token():
    lengths = {"chosen_tokens": [2] * 30 + [20] * 10, "source": ["a"] * 30 + ["b"] * 10}
    margins = {"chosen_rewards": [-0.1] * 30 + [-6.0] * 10, "rejected_rewards": [-1.2] * 40}
    found = dataclasses.replace(free(40, 8, 20))
    found.columns.update({name: np.array(values) for name, values in (lengths | margins).items()})
    told = one(first(found), "Length alone explains the accuracy: the model prefers the shorter response.")
    assert "simpo" not in told.advice and "loss.ld_alpha" in told.advice
    referred = length_case(1.0, 0.0)
    measures = Measures(referred, per_token=True)
    (same,) = [one for one in findings(run_of(referred), measures) if one.title.startswith("Length alone")]
    assert "simpo" not in same.advice and "simpo" in one(verdict(referred), "Length alone").advice
    below = one(first(found), "Below 50% on b.")
    assert below.kind == "warn" and below.evidence.startswith("b: 0.0% of 10 pairs")
    found.columns["source"] = np.array(["a", "b"] * 20)
    assert one(first(found), "No source is clearly below 50%.").kind == "note"


def test_no_evaluation():
    found = verdict(None, loss=series(0.7, 0.6))
    assert one(found, "No results on held-out pairs can be read").kind == "note"


def test_a_run_that_has_not_trained_is_not_judged():
    config = {"train": {"eval_interval": 25}, "data": {"validation": "held.jsonl"}}
    found = evaluation([0.0] * 30, chosen_logps=[-5.0] * 12 + [-6.0] * 18, facts={"step": 0})
    run = dataclasses.replace(run_of(found, eval__loss=series(0.6931, start=0)), config=config, total_steps=75)
    (told,) = findings(run, Measures(found))
    assert told.kind == "note" and told.title.startswith("Not trained yet") and "in 20.0% of 30 pairs" in told.evidence


def test_advice_about_evaluations_names_what_is_missing():
    data, every = {"validation": "held.jsonl"}, {"eval_interval": 25}
    for config, total, says in (
        ({}, 0, "Set data.validation or data.validation_fraction, and train.eval_interval."),
        ({"data": data}, 0, "Set train.eval_interval."),
        ({"train": every}, 0, "Set data.validation or data.validation_fraction."),
        ({"data": data, "train": every}, 75, ""),
        ({"data": data, "train": every}, 2, "Set a smaller train.eval_interval."),
    ):
        run = dataclasses.replace(run_of(loss=series(0.7, 0.6)), config=config, total_steps=total)
        assert findings(run, None)[0].advice == says
        one_evaluation = dataclasses.replace(run, series=run.series | {"eval/loss": series(0.6, start=2)})
        told = findings(one_evaluation, Measures(evaluation([1.0] * 20)))
        assert says in [one.advice for one in told if one.title.startswith("There are fewer than two")]


def test_an_evaluation_with_bad_numbers():
    """The newest evaluation cannot be read, so the pairs are those of step 2. The loss of step 3 is not finite."""
    found = evaluation([1.0] * 20, facts={"step": 2})
    run = run_of(found, eval__loss=series(0.6, 0.4, math.nan))
    told = findings(run, Measures(found, lambda step: found))
    assert (told[0].kind, told[0].title) == ("bad", "The held-out loss after step 3 is not a finite number.")
    assert told[0].evidence.endswith("The findings about pairs describe step 2.")
    assert not any("overfitting" in one.title.lower() for one in told) and {one.kind for one in told[1:]} == {"note"}
    # Now the loss of step 3 is finite, but the results of step 3 for single pairs are unknown.
    known = findings(run_of(found, eval__loss=series(0.6, 0.4, 0.7)), Measures(found, lambda step: found))
    (rises,) = [one for one in known if one.title.startswith("Overfitting since step 2")]
    assert "paired" not in rises.evidence and known[0].kind == "note"


def test_ranking_counts_flips():
    # Of 40 pairs, the reference ranks 10 correctly. The policy ranks these 10 pairs and 20 other pairs correctly.
    reference = np.array([1.0] * 10 + [-1.0] * 30)
    policy = np.array([1.0] * 30 + [-1.0] * 10)
    logps = {"ref_chosen_logps": reference - 5, "chosen_logps": policy - 5, "rejected_logps": [-5.0] * 40}
    better = one(verdict(evaluation(policy - reference + 0.1, **logps)), "The policy ranks more pairs correctly by")
    assert better.title.endswith("25.0% → 75.0%.") and "20 pairs became right, 0 became wrong" in better.evidence
    assert "difference +50.0 points" in better.evidence
    swapped = {"ref_chosen_logps": policy - 5, "chosen_logps": reference - 5, "rejected_logps": [-5.0] * 40}
    worse = one(verdict(evaluation(reference - policy, **swapped)), "The policy ranks fewer pairs")
    assert worse.kind == "bad" and "0 pairs became right, 20 became wrong" in worse.evidence
    same = {"ref_chosen_logps": policy - 5, "chosen_logps": policy - 5, "rejected_logps": [-5.0] * 40}
    assert (
        one(verdict(evaluation(policy, **same)), "No clear change in the share of pairs ranked correctly").kind
        == "note"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "start", "kind"),
    [
        (-3.0, -9.0, "Chosen responses became less likely in 100.0% of the pairs, but rejected", "warn"),
        (-3.0, -1.0, "Chosen responses became less likely in 100.0% of the pairs, and rejected", "warn"),
        (2.0, -1.0, "Margins grew from both sides", "good"),
        (2.0, 1.0, "Chosen responses became more likely; rejected", "note"),
        (0.0, -4.0, "No clear change in the likelihood of chosen", "note"),
    ],
)
def test_displacement(chosen, rejected, start, kind):
    count = 30
    wave = 0.01 * np.sin(np.arange(count)) * (chosen != 0)
    logps = {"chosen_logps": -5 + chosen + wave, "rejected_logps": np.full(count, -5 + rejected)}
    found = one(verdict(evaluation(np.full(count, chosen - rejected), **logps)), start)
    assert found.kind == kind and f"rejected {rejected:+.3f} nats".replace("-", "−") in found.evidence


def sure(found):
    """Return an evaluation with reward margins of 8 and the same chosen log-probabilities as ``found``."""
    return evaluation([8.0] * 20, chosen_logps=found.columns["chosen_logps"], rejected_logps=[-5.0] * 20)


def test_a_policy_far_from_the_reference():
    near, far = (evaluation([1.0] * 20, chosen_logps=[-5.0 - d] * 20, rejected_logps=[-5.0] * 20) for d in (31, 33))
    assert not any("changed by" in title for title in verdict(near))  # 31 nats / 16 tokens = 1.94 nats per token
    assert one(verdict(far), "The log-probability of a token changed by 2.1 nats").kind == "warn"
    sizes = "4.1 nats per token of chosen responses, 0.0 per token of rejected ones"
    assert sizes in one(verdict(far), "The log-probability of a token").evidence
    falling = {"eval__loss": series(0.6, 0.4)}
    for start in ("No overfitting so far", "No clear difference between the model's confidence"):
        kinds = [one(verdict(found, **falling), start).kind for found in (sure(near), sure(far))]
        assert kinds == ["good", "note"], "far from the reference, the finding must be a note"
    headline = one(verdict(far), "Better on held-out pairs (accuracy 100.0% on 20 pairs), but the policy is very far")
    assert headline.kind == "warn" and "Read generations" in headline.advice


def test_overfitting():
    found = evaluation([1.0] * 20, facts={"step": 3})
    rising = {"eval__loss": series(0.6, 0.4, 0.7)}
    over = one(verdict(found, **rising), "Overfitting since step 2")
    assert over.kind == "warn" and over.advice.startswith("Step 2 has no checkpoint, and no other step has one.")
    for kept, says in (
        ([2, 3], "Use the checkpoint of step 2 (`export --step 2`)"),
        ([3], "Step 2 has no checkpoint; only step 3 has one."),
        ([1, 3], "Step 2 has no checkpoint; only steps 1 and 3 have one."),
    ):
        told = findings(dataclasses.replace(run_of(found, **rising), kept=kept), Measures(found))
        (advice,) = [one.advice for one in told if one.title.startswith("Overfitting since step 2")]
        assert advice.startswith(says) and ("checkpoint.keep_best" in advice) == (2 not in kept)
    start = verdict(found, eval__loss=series(0.4, 0.5, 0.7, 0.8, start=0))
    assert one(start, "Overfitting since step 0").advice.startswith("Step 0 is the model before training.")
    level = {"eval__loss": series(0.6, 0.4, 0.401)}
    assert one(verdict(found, **level), "No clear overfitting").kind == "note"
    assert one(verdict(found, eval__loss=series(0.6, 0.5, 0.4)), "No overfitting so far").kind == "good"
    assert one(verdict(found, eval__loss=series(0.6)), "There are fewer than two evaluations").kind == "note"
    assert one(verdict(found), "There are fewer than two evaluations").kind == "note"
    # If the best step and the last step were evaluated on the same pairs, and the losses of these pairs are known for
    # both steps, the verdict depends on the interval of the paired difference.
    loss = found.columns["loss"]
    noisy = evaluation([1.0] * 20, loss=loss - 0.02 - 0.2 * (-1.0) ** np.arange(20))
    assert one(verdict(found, noisy, **rising), "No clear overfitting").kind == "note"
    better = evaluation([1.0] * 20, loss=loss - 0.3)
    assert "paired difference +0.300" in one(verdict(found, better, **rising), "Overfitting since step 2").evidence
    others = evaluation([1.0] * 20, ids=[f"{i:032x}" for i in range(100, 120)])
    assert "paired" not in one(verdict(found, others, **rising), "Overfitting since step 2").evidence


def test_a_loss_above_its_start():
    found = evaluation([1.0] * 20)
    bad = verdict(found, eval__loss=series(0.8, 0.9), loss=series(0.6931, 0.1))
    assert "0.6931 at the start, 0.9000 after step 2" in one(bad, "The held-out loss is higher").evidence
    fine = verdict(found, eval__loss=series(0.6931, 0.5, start=0), loss=series(0.5, 0.1))
    assert not any(title.startswith("The held-out loss is higher") for title in fine)


def test_training_pairs_fit_better():
    found = evaluation([1.0] * 70 + [-1.0] * 30)
    gap = one(verdict(found, rewards__accuracies=series(*[0.5] * 90, *[0.99] * 10)), "The model fits training pairs")
    assert "99.0% against 70.0%" in gap.title and "last 10 logged steps" in gap.evidence
    assert not any("fits training" in title for title in verdict(found, rewards__accuracies=series(*[0.75] * 100)))
    assert not any("fits training" in title for title in verdict(found, rewards__accuracies=series(*[math.nan] * 20)))


def length_case(right_longer, right_shorter, count=40):
    """Return an evaluation. In 75% of its pairs, the chosen response is longer; in the others, it is shorter.

    right_longer   share of correctly ranked pairs among the pairs whose chosen response is longer
    right_shorter  share of correctly ranked pairs among the pairs whose chosen response is shorter
    """
    longer = np.arange(count) < 0.75 * count
    right = np.where(longer, np.arange(count) % 10 < 10 * right_longer, np.arange(count) % 10 < 10 * right_shorter)
    return evaluation(np.where(right, 1.0, -1.0), chosen_tokens=np.where(longer, 20, 10), rejected_tokens=[15] * count)


def test_length():
    bad = one(verdict(length_case(1.0, 0.0)), "Length alone explains the accuracy: the model prefers the longer")
    assert bad.kind == "bad" and "is right in 75.0% of the pairs" in bad.evidence
    part = one(verdict(length_case(1.0, 0.5, 400)), "Length explains part of the accuracy")
    assert part.kind == "warn" and "accuracy is 100.0%; where it is wrong, 50.0%" in part.evidence
    assert one(verdict(length_case(0.8, 0.8)), "Length alone does not explain").kind == "good"
    assert one(verdict(evaluation([1.0] * 20)), "Both responses of every pair are equally long").kind == "note"
    few = evaluation([1.0] * 20, chosen_tokens=[9] * 2 + [8] * 18)
    short = one(verdict(few), "Length may or may not explain the accuracy: too few pairs")
    assert (
        short.kind == "note"
        and "equally long responses counts as half right. Different lengths: 2 pairs of 20." in short.evidence
    )


def test_sources():
    margins = np.array([1.0] * 30 + [-1.0] * 30)
    found = verdict(evaluation(margins, source=["data/good.jsonl"] * 30 + ["data/bad.jsonl"] * 30))
    bad = one(found, "Worse on bad.jsonl")
    assert bad.evidence.startswith("bad.jsonl: 0.0% of 30 pairs") and "good.jsonl: 100.0%" in bad.evidence
    fine = verdict(evaluation([1.0] * 60, source=["a/x"] * 30 + ["b/x"] * 30))
    assert one(fine, "No source got clearly worse; a/x has the lowest").kind == "good"
    few = verdict(evaluation([1.0] * 6, source=["a"] * 3 + ["b"] * 3))
    assert one(few, "Every source has too few pairs").kind == "note"


def test_only_the_largest_of_many_sources_are_judged():
    names = [f"s{i:02}" for i in range(40) for _ in range(2)] + ["big"] * 20
    found = Measures(evaluation([1.0] * 100, source=names)).sources
    assert len(found) == 30 and next(iter(found)) == "big" and found["big"].pairs == 20


def test_calibration():
    sure = evaluation([6.0] * 70 + [-6.0] * 30)
    over = one(verdict(sure), "The model is overconfident")
    confidence = 1 / (1 + math.exp(-6.0))
    assert f"Mean confidence {100 * confidence:.1f}%, accuracy 70.0%" in over.evidence
    brier = 0.7 * (1 - confidence) ** 2 + 0.3 * confidence**2
    assert f"error {confidence - 0.7:.3f}, Brier score {brier:.3f}" in over.evidence
    assert one(verdict(evaluation([0.1] * 50)), "The model is underconfident").kind == "note"
    few = evaluation([0.1] * 7 + [-0.1] * 3)
    assert one(verdict(few), "No clear difference between the model's confidence"), (
        "10 pairs must be too few to show that the model is underconfident"
    )
    half = math.log(0.8 / 0.2)
    assert (
        one(verdict(evaluation([half] * 80 + [-half] * 20)), "No clear difference between the model's confidence").kind
        == "good"
    )


def test_calibration_error_counts_pairs_by_weight():
    measures = Measures(evaluation([2.0, -0.2], weight=np.array([3.0, 1.0])))
    sure, unsure = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-0.2))
    assert measures.calibration_error == pytest.approx((3 * (1 - sure) + unsure) / 4)


def test_reliability_bins_and_weights():
    margins = [math.log(p / (1 - p)) for p in (0.52, 0.53, 0.97, 0.98)]
    found = evaluation([margins[0], -margins[1], margins[2], margins[3]], weight=[1, 3, 1, 1])
    (low, high) = Measures(found).reliability
    assert low == pytest.approx((0.25 * 0.52 + 0.75 * 0.53, 0.25, 2)) and high == pytest.approx((0.975, 1.0, 2))


def test_health():
    found = evaluation([1.0] * 20)
    norms = np.ones(40)
    norms[7] = 50
    seen = verdict(found, skipped_steps=series(0, 0, 2), grad_norm=series(*norms))
    assert one(seen, "Steps were skipped").evidence.startswith("2 of 3 steps")
    assert "50 at step 8; the median is 1." in one(seen, "The gradient norm has a spike").evidence
    ended = dataclasses.replace(run_of(found), ended="a rank was lost")
    assert findings(ended, Measures(found))[0].evidence == "a rank was lost"


def test_best_step_follows_keep_best():
    run = run_of(eval__loss=series(0.6, 0.4, 0.7), **{"eval__rewards/accuracies": series(0.5, 0.6, 0.9)})
    assert best_step(run) == (2, "eval/loss")
    asked = {"checkpoint": {"keep_best": {"metric": "eval/rewards/accuracies", "mode": None}}}
    assert best_step(dataclasses.replace(run, config=asked)) == (3, "eval/rewards/accuracies")
    assert best_step(run_of(eval__loss=series(0.6))) is None
