"""Tests of reports about one run or several: pages, text for terminals, and the time and memory to write a page."""

import base64
import dataclasses
import gzip
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from dpo_engine.errors import ConfigError
from dpo_engine.reporting.page import write
from dpo_engine.reporting.page.charts import Judged, held_out
from dpo_engine.reporting.page.measures import Measures
from dpo_engine.reporting.page.pair_charts import pair_charts
from dpo_engine.reporting.page.pair_table import flips, pair_rows, tokens
from dpo_engine.reporting.page.run_files import RunFiles
from dpo_engine.reporting.page.settings import rank_grid, settings
from dpo_engine.reporting.page.text import show_runs, sparkline
from dpo_engine.reporting.page.write import page, read_runs, write_page
from dpo_engine.reporting.token_file import TokenText
from support.evaluations import evaluation
from support.runs_on_disk import pairs, write_directory


def data_of(html):
    packed = re.search(r'id="data">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("runs") / "one", count=60, shown=12)


def test_the_page_has_what_the_files_say(folder, tmp_path):
    write_page([folder], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    data = data_of(html)
    charts = {chart["id"]: chart for group in data["charts"].values() for chart in group}
    assert {"loss", "accuracy", "margin", "rewards", "displacement", "grad_norm", "learning_rate"} < charts.keys()
    assert {"held", "sources", "lengths", "margins", "flip", "calibration", "length"} < charts.keys()
    assert {"pairs_per_s", "step_time", "mfu", "layout_gain", "memory"} < charts.keys()
    training, held = charts["loss"]["traces"]
    assert len(training["X"]) == 60 and held["X"] == [20, 40, 60] and held["Y"][2] == pytest.approx(0.39)
    marks = {(mark["kind"], mark["at"]) for mark in charts["loss"]["marks"]}
    assert marks == {("save", 20), ("restart", 20), ("best", 60)}
    outside = charts["step_time"]["traces"][1]
    assert outside["Y"] == pytest.approx([0.5] * 58), "the made-up steps take 2 s and end 2.5 s apart"
    assert 21 not in outside["X"], "before step 21, the run was restarted"
    counts = [sum(trace["Y"]) for trace in charts["margins"]["traces"]]
    assert counts == [60, 60] and [trace["name"] for trace in charts["margins"]["traces"]] == ["reference", "policy"]
    assert len(data["pairs"]) == 12 and "Better on held-out pairs" in html and "clip_grad" in html
    for pair in data["pairs"]:
        for side in ("chosen", "rejected"):
            part = pair[side]
            assert sum(part["v"]) == pytest.approx(part["sum"], abs=0.3) and len(part["t"]) == pair[f"{side}_tokens"]
        change = pair["chosen"]["sum"] - pair["chosen"]["refsum"] - pair["rejected"]["sum"] + pair["rejected"]["refsum"]
        assert change == pytest.approx(pair["change"], abs=0.01)
    assert not re.search(r"(src|href)=[\"'](?!#)", re.sub(r"<script.*?</script>", "", html, flags=re.S))


def test_only_keys_that_were_changed_are_marked(folder):
    found = {key.path: key for (run, _) in read_runs([folder]) for key in settings(run)}
    assert found["optim.lr"].changed is False and found["parallel.tp"].changed and found["parallel.tp"].default == "1"
    assert found["loss.beta"].shown and not found["loss.beta"].changed, "its default is in the loss's code"
    assert not found["optim.clip_grad"].shown and found["model.path"].changed
    assert found["loss.beta"].default == "(in the code of the loss or plugin)"
    assert found["model.path"].default == "(no default)"


@pytest.mark.slow  # it imports Megatron
def test_ranks_are_where_megatron_puts_them():
    from megatron.core.parallel_state import RankGenerator

    made = RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    grid = rank_grid({"tp": 2, "pp": 2, "cp": 2, "dp": 3})
    stages = [row for copy in grid["copies"] for stage in copy for row in stage]
    assert sorted(stages) == sorted(made.get_ranks("tp"))
    pipelines = [[copy[s][c][t] for s in range(2)] for copy in grid["copies"] for c in range(2) for t in range(2)]
    assert sorted(pipelines) == sorted(made.get_ranks("pp"))
    columns = [[stage[c][t] for c in range(2)] for copy in grid["copies"] for stage in copy for t in range(2)]
    assert sorted(columns) == sorted(made.get_ranks("cp"))
    assert rank_grid({"tp": 1, "pp": 1, "cp": 1, "dp": 9})["more"] == 5 and rank_grid(None) is None


def test_tokens_of_a_page():
    text = TokenText("a", 0, "", "chosen", range(5), ["", "\N{OWL}", "x" * 999, "b", ""], [-1, -2, -3, np.nan, -5])
    found = tokens(TokenText(**{**text.__dict__, "scored": [True, True, True, False, True]}), 9)
    assert found["t"][0] == "\N{OWL}" and found["v"] == [-3, -3, None, -5] and found["t"][3] == ""
    assert found["t"][1].endswith("… (699 more characters)") and found["sum"] == -11 and found["r"] is None
    few = tokens(TokenText(**{**text.__dict__, "scored": [True] * 5, "ref_logps": [-1] * 5}), 2)
    assert len(few["t"]) == 2 and few["more"] == 2 and few["refsum"] == -5


def test_values_outside_of_the_histogram_are_named(tmp_path):
    margins = np.array([0.0, *np.linspace(-5, 5, 1000), 90.0, 91.0, 92.0, -80.0, -81.0, -82.0])
    found = evaluation(margins)
    (chart, *_) = pair_charts([Judged(RunFiles(tmp_path, "run", evaluation=found), Measures(found))])
    bars = chart["traces"][1]
    low, high = bars["text"][0], bars["text"][-1]
    assert low.startswith("≤ -") and high.startswith("≥ ")
    edge = high.removeprefix("≥ ")
    assert (
        f"The outermost bars contain all values of {edge} or more and all values up to {low.removeprefix('≤ ')}."
        in chart["note"]
    )
    assert bars["Y"][-1] == (margins >= float(edge)).sum() and sum(bars["Y"]) == len(margins)
    inside = evaluation(np.linspace(-1, 1, 40))
    few = next(pair_charts([Judged(RunFiles(tmp_path, "run", evaluation=inside), Measures(inside))]))
    assert few["traces"][0]["text"][0].startswith("-1 to") and "bar" not in few["note"]


def test_pairs_have_every_kind_that_fits(tmp_path):
    """Each shown pair whose ranking flipped has a kind that says so, even if the pair was shown for another reason."""
    reference = np.array([-1.0] * 20 + [1.0] * 4)
    policy = np.array([1.0] * 18 + [-1.0] * 6)
    logps = {"ref_chosen_logps": reference - 5, "chosen_logps": policy - 5}
    found = evaluation(policy - reference - 0.5, **logps)
    folder = write_directory(tmp_path / "run", found=found, shown=12)
    judged = read_runs([folder])
    rows = pair_rows(judged)
    right = [row["index"] for row in rows if "became right" in row["kinds"]]
    wrong = [row["index"] for row in rows if "became wrong" in row["kinds"]]
    assert right == [row["index"] for row in rows if row["index"] < 18]
    assert wrong == [row["index"] for row in rows if row["index"] >= 20]
    assert any(row["kinds"] == ["random", "became right"] for row in rows)
    assert flips(judged) == {"became right": 18, "became wrong": 4} == data_of(page(judged))["flips"]
    lowest = [row for row in rows if "lowest reward margin" in row["kinds"]]
    assert lowest and all(row["margin"] < 0 for row in lowest)
    old = dataclasses.replace(
        judged[0].run, tokens=[dataclasses.replace(text, shown="most wrong") for text in judged[0].run.tokens]
    )
    assert {row["kinds"][0] for row in pair_rows([Judged(old, judged[0].measures)])} == {"lowest reward margin"}


def test_without_tokens_the_page_says_how_to_write_them(folder, tmp_path):
    bare = write_directory(tmp_path / "bare", count=20, shown=2)
    (bare / "eval/step_00000060.tokens.parquet").write_bytes(b"x")
    html = page(read_runs([bare]))
    verdict, _, section = html.partition('<section id="pairs">')
    assert "is not a readable token file" in section and "cannot be read" not in verdict
    assert f"dpo-engine eval {bare}/config.yaml --step 60 --tokens 64" in section and 'href="#pairs"' in html
    assert 'id="pair-table"' not in html and 'id="pair-table"' in page(read_runs([folder, bare]))


def test_the_page_asks_to_reload_only_if_the_run_may_go_on(folder, tmp_path):
    assert "reload the page" not in page(read_runs([folder]))
    going = write_directory(tmp_path / "going", count=20, shown=2)
    with (going / "log.txt").open("a") as log:
        log.write("2026-01-02 03:04:05 --- started again after step 20 of 90, process 9 on host ---\n")
    assert "reload the page" in page(read_runs([going])) and "reload the page" not in page(read_runs([going, folder]))


def test_the_pause_before_a_restart_is_not_training_time(tmp_path):
    """Steps take 2 s and end 2.5 s apart. The run is restarted after step 20.

    A pause of 270 s before the restart must change neither the training time nor the time between steps.
    """
    folder = write_directory(tmp_path / "run", count=20, shown=2)
    assert "0:02:29 of training" in page(read_runs([folder])), "steps 1 and 21 count 2 s each, other steps 2.5 s"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    later = [line | {"time": line["time"] + 270 * (line["step"] > 20)} if "time" in line else line for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, later)))
    found = page(read_runs([folder]))
    assert "0:02:29 of training" in found
    outside = {chart["id"]: chart for chart in data_of(found)["charts"]["speed"]}["step_time"]["traces"][1]
    assert max(outside["Y"]) == pytest.approx(0.5)


def test_charts_of_a_run_without_a_reference(folder, tmp_path):
    columns = {"ref_chosen_logps": [np.nan] * 60, "ref_rejected_logps": [np.nan] * 60}
    found = pairs(60, facts={"loss": {"name": "simpo"}, "reference": None}, **columns)
    other = write_directory(tmp_path / "simpo", found=found, shown=2)
    with (other / "metrics.jsonl").open("a") as file:
        for step in (20, 40, 60):
            file.write(f'{{"step": {step}, "loss_margin/accuracies": 0.4, "eval/loss_margin/accuracies": 0.7}}\n')
    judged = read_runs([other])
    html = page(judged)
    charts = {chart["id"]: chart for group in data_of(html)["charts"].values() for chart in group}
    assert [trace["name"] for trace in charts["accuracy"]["traces"]][2:] == [
        "per token · training",
        "per token · held out",
    ]
    assert "flip" not in charts and charts["length"]["y"] == "reward margin per token"
    columns = judged[0].run.evaluation.columns
    each = columns["chosen_logps"] / columns["chosen_tokens"], columns["rejected_logps"] / columns["rejected_tokens"]
    accuracy = (each[0] > each[1]).mean()
    assert charts["held"]["traces"][0]["Y"][-1] == pytest.approx(accuracy) != columns["accuracy"].mean()
    assert charts["held"]["note"].startswith("Accuracy by log-probabilities per token")
    assert "log-ratio" not in charts["rewards"]["note"] and "no change" not in charts["accuracy"]["note"]
    console = Console(file=io.StringIO(), width=140)
    show_runs(judged, console)
    assert "accuracy per token" in console.file.getvalue() and f" {accuracy:.3f} " in console.file.getvalue()
    both = {chart["id"]: chart for chart in data_of(page(read_runs([folder, other])))["charts"]["curves"]}
    assert (
        "log-ratio to the reference" in both["rewards"]["note"] and "Without a reference: " in both["rewards"]["note"]
    )


def test_small_margins_keep_their_digits(tmp_path):
    """Very small margins are not rounded to 0, so that the table shows whether the ranking of a pair flipped."""
    logps = {"ref_chosen_logps": [-5.00021, -5.0, -6.0], "chosen_logps": [-4.0, -5.0, -4.9998]}
    folder = write_directory(tmp_path / "run", found=evaluation([1.0, 0.0, 1.0], **logps), shown=3)
    rows = {row["index"]: row for row in pair_rows(read_runs([folder]))}
    assert [rows[i]["reference"] for i in range(3)] == [-0.00021, 0, -1] and rows[2]["policy"] == 0.0002
    assert "-0.0," not in json.dumps(rows) and "became right" in rows[0]["kinds"]
    assert "became right" not in rows[1]["kinds"]
    tiny = TokenText("a", 0, "", "chosen", [1], ["a"], [-1e-9], scored=[True])
    assert json.dumps(tokens(tiny, 9)["v"]) == "[0]"


def test_the_legend_names_only_what_the_curves_have(folder, tmp_path):
    found = page(read_runs([folder]))
    assert "saved" in legend(found) and "restart" in legend(found) and "skipped" not in legend(found)
    other = write_directory(tmp_path / "two", count=20, shown=2)
    assert "best evaluation, in the color of its run" in legend(page(read_runs([folder, other])))
    assert "color" not in legend(found)


def legend(html):
    return re.search(r"The horizontal axis shows optimizer steps[^\n]*", html)[0]


def test_run_beside_run(folder, tmp_path):
    other = write_directory(
        tmp_path / "two", found=pairs(60, shift=3.0), shown=6, config={"optim": {"lr": 1e-5, "clip_grad": 1.0}}
    )
    html = page(read_runs([folder, other]))
    data = data_of(html)
    loss = data["charts"]["curves"][0]
    assert [trace["name"] for trace in loss["traces"]][1::2] == ["one · held out", "two · held out"]
    assert "Pairs in common: 60." in html and "two minus one" in html and "optim.lr" in html
    first, second = (run.evaluation.columns for run, _ in read_runs([folder, other]))
    won = int((second["accuracy"] > first["accuracy"]).sum())
    lost = int((second["accuracy"] < first["accuracy"]).sum())
    assert (
        f"two ranks {won} of these pairs better than one, {lost} worse" in html
        and "exact sign test of prompts: p = " in html
        and f"Pairs that the runs judge differently: {won + lost}</summary>" in html
    )
    assert {pair["run"] for pair in data["pairs"]} == {0, 1}
    assert next(held_out(read_runs([folder, other])))["traces"][1]["name"] == "two"


def test_runs_with_different_held_out_pairs(folder, tmp_path):
    ids = [f"{i:032x}" for i in range(30, 90)]
    half = write_directory(tmp_path / "half", found=pairs(60, id=ids), shown=2)
    html = page(read_runs([folder, half]))
    says = "Only some held-out pairs are the same in both runs, and only these pairs are compared: "
    assert f"{says}30 in common, 30 only in half, 30 only in one." in html
    none = write_directory(tmp_path / "none", found=evaluation([1.0], ids=["f" * 32]), shown=1)
    html = page(read_runs([folder, none]))
    assert "The runs were evaluated on different held-out pairs, so no pair can be compared." in html
    empty = write_directory(tmp_path / "empty", every=100)
    assert "One of the runs has no evaluation" in page(read_runs([folder, empty]))


def test_the_text_for_a_terminal(folder, tmp_path):
    other = write_directory(tmp_path / "two", every=100, config={"loss": {"name": "ipo"}})
    for directories in ([folder], [folder, other]):
        console = Console(file=io.StringIO(), width=140)
        show_runs(read_runs(directories), console)
        out = console.file.getvalue()
        assert "✓ Better on held-out pairs" in out and "eval/loss" in out and "▁" in out and "all pairs" in out
    assert "one of the runs has no evaluation" in out and "loss.name" in out and "settings that differ" in out
    # The pairs of the newest evaluation cannot be read, so the verdict and the table show the evaluation before it.
    bad = write_directory(tmp_path / "bad", count=20, shown=1)
    (bad / "eval/step_00000040.parquet").write_bytes((bad / "eval/step_00000060.parquet").read_bytes())
    (bad / "eval/step_00000060.parquet").write_bytes(b"x")
    console = Console(file=io.StringIO(), width=140)
    judged = read_runs([bad])
    judged[0].run.evaluation.facts["step"] = 40
    show_runs(judged, console)
    assert "after step 40 " in console.file.getvalue() and "after step 60 " not in console.file.getvalue()
    assert sparkline(np.array([0.0, 1.0, np.nan, 2.0])) == "▁▅ █" and sparkline(np.ones(90)) == "▁" * 40


def test_no_torch_and_atomic(folder, tmp_path):
    script = (
        "import sys\nfrom dpo_engine import cli\n"
        "code = cli.main(['report', *sys.argv[1:]])\n"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'megatron', 'transformers')))"
    )
    to = tmp_path / "page.html"
    for options in (["--to", str(to)], ["--text"]):
        done = subprocess.run([sys.executable, "-c", script, str(folder), *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and to.read_bytes().endswith(b"</html>\n")


def test_wrong_use_is_refused(folder, tmp_path, monkeypatch, capsys):
    from dpo_engine import cli
    from dpo_engine.verbs.report import report

    with pytest.raises(ConfigError, match=r"^--to=x.pdf: must end with .html; pass --to FILE.html$"):
        report([folder], to="x.pdf")
    assert cli.main(["report", str(folder), "--text", "--to", "x.html"]) == 2
    assert capsys.readouterr().err == "--to: has no effect with --text; remove one of them\n"
    write.plotly_script.cache_clear()
    monkeypatch.setattr(write, "find_spec", lambda name: None)
    assert cli.main(["report", str(folder)]) == 2
    says = "report: needs plotly for its charts; pip install 'dpo-engine[report]', or pass --text\n"
    assert capsys.readouterr().err == says and not (folder / "report.html").exists()
    assert cli.main(["report", str(folder), "--text"]) == 0


@pytest.mark.slow
def test_size_time_and_memory(tmp_path):
    """The run has 100,000 steps and 500 evaluations. The last evaluation has 50,000 pairs.

    The page shows 500 of these pairs, and each of their responses has 400 tokens.
    """
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 8))) + " " for _ in range(30_000)]
    folder = write_directory(
        tmp_path / "big", steps=100_000, every=200, count=50_000, shown=500, words=words, length=400
    )
    script = (
        "import re, sys, time\nfrom dpo_engine.reporting.page.write import write_page\n"
        "write_page([sys.argv[1]], sys.argv[2])\n"
        # The resource module would return the peak of the parent process if that peak were larger.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(time.process_time(), int(peak) * 1024)"
    )
    to = tmp_path / "page.html"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(folder), str(to)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seconds, memory = map(float, done.stdout.split())
    assert seconds < 10 and memory < 1e9 and to.stat().st_size < 6e6
    data = data_of(to.read_text())
    assert len(data["pairs"]) == 500
    loss = data["charts"]["curves"][0]["traces"][0]
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    values = [line["loss"] for line in lines if "loss" in line]
    assert min(loss["Y"]) == pytest.approx(min(values), rel=1e-5)
    assert max(loss["Y"]) == pytest.approx(max(values), rel=1e-5) and len(loss["Y"]) < 1300
