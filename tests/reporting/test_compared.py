"""Tests of the comparison of two runs on the report page and in the terminal: summary sentence, rows and sign test."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpo_engine.reporting.page.charts import Judged
from dpo_engine.reporting.page.compared import comparison
from dpo_engine.reporting.page.measures import Measures
from dpo_engine.reporting.page.run_files import RunFiles
from dpo_engine.reporting.page.text import show_runs
from support.evaluations import evaluation

COUNT = 255
WAVE = np.sin(np.arange(COUNT))


def judged(name, chosen, rejected, wrong=0, **more):
    """Return a run. Its rewards rank the pairs whose index is below `wrong` incorrectly, and the others correctly.

    `chosen` and `rejected` are the mean changes of the responses' log-probabilities, in nats. `chosen` must be greater
    than `rejected`.
    """
    moved = {"chosen_logps": -5 + chosen + 0.1 * WAVE, "rejected_logps": -5 + rejected - 0.1 * WAVE}
    margins = np.where(np.arange(COUNT) < wrong, -1.0, 0.1 * (chosen - rejected))
    found = evaluation(margins, **(moved | more))
    return Judged(RunFiles(Path(name), name, evaluation=found), Measures(found))


def test_summary_says_what_became_worse_despite_a_better_accuracy():
    """The first run ranks four pairs incorrectly, and the second run ranks all pairs correctly.

    A difference of four pairs is too small to be statistically clear. The summary must also say what became worse.
    """
    told = comparison(judged("dpo", 0.6, -3.7, wrong=4), judged("hot", -2.07, -48.8))
    assert told["found"]["sign_test"] == 0.125 and (told["found"]["won"], told["found"]["lost"]) == (4, 0)
    rows = {row.name: row for row in told["rows"]}
    accuracy = rows["reward accuracy"]
    assert accuracy.difference.mean == pytest.approx(4 / 255) and accuracy.difference.low < 0 and not accuracy.clear
    chosen = rows["chosen, change in nats"]
    assert (chosen.later, chosen.first) == pytest.approx((-2.07, 0.6), abs=0.01) and chosen.clear
    assert chosen.difference.mean == pytest.approx(-2.67) and rows["rejected, change in nats"].clear
    assert rows["distance, nats per token"].later == pytest.approx((2.07 + 48.8) / 16, abs=0.01)
    loss = [np.log1p(np.exp(-0.43)), np.log1p(math.e), np.log1p(np.exp(-4.673))]
    first = (251 * loss[0] + 4 * loss[1]) / 255
    assert rows["held-out loss"].difference.mean == pytest.approx(loss[2] - first)
    assert told["summary"] == (
        "hot: +1.6 points of reward accuracy, which is no clear difference; the held-out loss is lower by "
        f"{first - loss[2]:.3g}; but chosen responses became less likely by 2.67 nats compared with dpo, and the "
        "policy is very far from the reference (3.2 nats per token; dpo: 0.3)."
    )


def test_a_run_with_a_clearly_worse_accuracy():
    told = comparison(judged("a", -1.0, -4.0), judged("b", 1.0, -1.0, wrong=40))
    share, rose = 100 * 40 / 255, told["found"]["margin"]
    assert told["summary"].startswith(f"b: \u2212{share:.1f} points of reward accuracy; the held-out loss is higher by")
    assert (
        told["summary"].endswith("; but chosen responses became more likely by 2.00 nats compared with a.")
        and rose["mean"] < 0
    )
    assert {row.name for row in told["rows"] if row.clear} >= {"reward accuracy", "chosen, change in nats"}


def test_rows_that_cannot_be_compared_are_left_out():
    without = judged("b", 1.0, -1.0, ref_chosen_logps=[math.nan] * COUNT, facts={"loss": {"name": "simpo"}})
    told = comparison(judged("a", 1.0, -1.0), without)
    assert [row.name for row in told["rows"]] == [
        "reward accuracy",
        "reward margin",
        "likelihood accuracy",
        "likelihood accuracy per token",
    ]
    assert told["summary"] == "b: +0.0 points of reward accuracy, which is no clear difference."


def test_runs_with_different_references_are_compared_by_likelihood(tmp_path):
    """If the references differ, the summary compares likelihood accuracies instead of reward accuracies."""
    logps = {"chosen_tokens": [4] * COUNT, "ref_chosen_logps": [math.nan] * COUNT}
    simpo = judged("simpo", 1.0, -1.0, facts={"loss": {"name": "simpo"}, "reference": None, "step": 20}, **logps)
    told = comparison(judged("dpo", 1.0, -1.0, wrong=16, facts={"step": 75}), simpo)
    assert told["summary"].startswith(
        "simpo: +0.0 points of likelihood accuracy, which is no clear difference (per token: \u2212100.0 points; the "
        "runs differ in the reference, so their reward accuracies have different meanings)"
    )
    assert [row.name for row in told["rows"]][:2] == ["likelihood accuracy", "reward accuracy"]
    assert told["found"]["steps"] == [20, 75]
    beta = comparison(judged("a", 1.0, -1.0), judged("b", 1.0, -1.0, facts={"loss": {"name": "sigmoid", "beta": 0.2}}))
    assert beta["found"]["other_units"] == ["loss"] and "points of reward accuracy" in beta["summary"]


def test_the_terminal_shows_the_sentence_too():
    runs = [judged("dpo", 0.6, -3.7, wrong=4), judged("hot", -2.07, -48.8)]
    console = Console(file=io.StringIO(), width=140)
    show_runs(runs, console)
    out = console.file.getvalue()
    told = comparison(*runs)
    assert told["summary"] in out and "sign test of prompts: p = 0.125" in out
    assert "hot, step 4  dpo, step 4  difference" in out
    assert "the reward accuracy is higher in hot than in dpo for 4 of them, lower for 0 and equal for 251; sign" in out
    for row in told["rows"]:
        mean, low, high = (f"{value:+.3f}".replace("-", "\u2212") for value in row.difference)
        assert re.search(
            rf"^{row.name} .* {re.escape(mean)} +{re.escape(low)} to {re.escape(high)}$", out, re.MULTILINE
        )
    assert len(told["rows"]) == 8
