"""Tests of the page's comparison of two runs: its sentence, its rows, and its exact test."""

import io
import math
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
    """Return a run whose responses moved by these mean numbers of nats, with `wrong` pairs ranked wrongly."""
    moved = {"chosen_logps": -5 + chosen + 0.1 * WAVE, "rejected_logps": -5 + rejected - 0.1 * WAVE}
    margins = np.where(np.arange(COUNT) < wrong, -1.0, 0.1 * (chosen - rejected))
    found = evaluation(margins, **(moved | more))
    return Judged(RunFiles(Path(name), name, evaluation=found), Measures(found))


def test_a_run_with_a_better_accuracy_that_broke():
    """Four pairs are better and none is worse: no clear difference. The same sentence names what got worse."""
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
        f"{first - loss[2]:.3g}; but chosen responses fell by 2.67 nats relative to dpo, and it is very far from the "
        "reference (3.2 nats per token; dpo: 0.3)."
    )


def test_a_run_with_a_clearly_worse_accuracy():
    told = comparison(judged("a", -1.0, -4.0), judged("b", 1.0, -1.0, wrong=40))
    share, rose = 100 * 40 / 255, told["found"]["margin"]
    assert told["summary"].startswith(f"b: \u2212{share:.1f} points of reward accuracy; the held-out loss is higher by")
    assert told["summary"].endswith("; but chosen responses rose by 2.00 nats relative to a.") and rose["mean"] < 0
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


def test_the_terminal_shows_the_sentence_too():
    runs = [judged("dpo", 0.6, -3.7, wrong=4), judged("hot", -2.07, -48.8)]
    console = Console(file=io.StringIO(), width=140)
    show_runs(runs, console)
    out = console.file.getvalue()
    assert comparison(*runs)["summary"] in out and "sign test of prompts: p = 0.125" in out
