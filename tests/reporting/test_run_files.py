"""Tests of reading a run's directory, and of thinning curves."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_engine.errors import ConfigError
from dpo_engine.reporting.page.foreign import visible
from dpo_engine.reporting.page.run_files import names_of, read_run
from dpo_engine.reporting.page.thinning import thinned
from dpo_engine.reporting.token_file import write_tokens
from support.runs_on_disk import write_directory


def test_everything_in_a_directory_is_read(tmp_path):
    folder = write_directory(tmp_path / "run", steps=60, every=20, count=40, shown=6)
    run = read_run(folder, "run")
    assert run.step == 60 and run.total_steps == 60 and run.starts == [0, 20] and run.saved == [20]
    assert run.layout == {"tp": 2, "pp": 2, "vpp": 1, "cp": 1, "dp": 3} and run.ended is None
    assert run.get("loss.beta") == 0.1 and run.get("loss.beta.x") is None and run.get("no.key", 3) == 3
    assert len(run.series["loss"].values) == 60 and run.series["eval/loss"].steps.tolist() == [20, 40, 60]
    assert run.series["grad_norm"].last == pytest.approx(1.0, abs=0.1)
    assert sorted(run.summaries) == [20, 40, 60] and list(run.files) == [60]
    assert len(run.evaluation) == 40 and len(run.tokens) == 18 and run.problems == [] and run.no_tokens == ""


def test_damaged_and_stale_files(tmp_path):
    folder = write_directory(tmp_path / "run", steps=60, every=20, count=20, shown=2)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    again = json.dumps({"step": 1, "loss": None, "text": "x", "list": [1]})
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:25], again, "[1]", "{}", '{"step": 26, "lo']))
    (folder / "eval/step_00000020.json").write_text('{"groups": [{}]}')
    (folder / "config.yaml").write_text("- a list\n")
    with (folder / "log.txt").open("a") as log:
        log.write("2026-01-02 03:04:05 ended: optim.lr=1: too high\n")
    run = read_run(folder, "run")
    assert run.step == 24 and run.ended == "optim.lr=1: too high"
    assert np.isnan(run.series["loss"].values[0]) and "text" not in run.series, "the last value of a step must count"
    assert run.evaluation is None and not run.summaries, "evaluations of later steps belong to an earlier start"
    assert run.problems == [
        f"{folder}/eval/step_00000020.json: is not a summary of an evaluation; run the evaluation again",
        f"{folder}/config.yaml: is not the configuration of a run",
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "eval/step_00000060.tokens.parquet").write_bytes(b"x")
    run = read_run(folder, "run")
    assert len(run.problems) == 2 and "cannot be read as tokens of pairs" in run.no_tokens
    command = f"To write it: dpo-engine eval {folder}/config.yaml --step 60 --tokens 64"
    assert run.no_tokens.endswith(f". {command}") and "again" not in run.no_tokens
    (folder / "eval/step_00000060.tokens.parquet").unlink()
    path = folder / "eval/step_00000060.tokens.parquet"
    assert read_run(folder, "run").no_tokens == f"{path}: does not exist. {command}"
    write_tokens(path, [], {})
    assert read_run(folder, "run").no_tokens == f"{path}: contains no pairs. {command}"
    (folder / "checkpoints/step_00000060").rename(folder / "checkpoints/step_00000040")
    why = f"{path}: contains no pairs, and the checkpoint of step 60 is gone."
    assert read_run(folder, "run").no_tokens == f"{why} With logging.token_samples=64, a run writes tokens"
    (folder / "eval/step_00000060.parquet").write_bytes(b"x")
    run = read_run(folder, "run")
    assert run.evaluation is None and "cannot be read as Parquet" in run.problems[1]
    (folder / "config.yaml").unlink()
    assert read_run(folder, "run").config == {}


def test_an_evaluation_without_a_summary_is_summarized(tmp_path):
    folder = write_directory(tmp_path / "run", count=20, shown=2)
    before = read_run(folder, "run").summaries[60]["groups"]
    (folder / "eval/step_00000060.json").unlink()
    assert read_run(folder, "run").summaries[60]["groups"] == before


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_run(tmp_path, "x")
    says = f"{tmp_path}: contains no metrics.jsonl and no evaluations; pass the train.output_dir of a run"
    assert str(caught.value) == says


def test_a_restart_from_the_beginning_forgets_earlier_starts(tmp_path):
    folder = write_directory(tmp_path / "run", count=20, shown=1)
    with (folder / "log.txt").open("a") as log:
        log.write("2026-01-02 03:04:05 --- started again after step 0 of 60, process 9 on host ---\n")
    run = read_run(folder, "run")
    assert run.starts == [0] and run.saved == []


def test_names_are_short_and_differ(tmp_path):
    paths = [tmp_path / "a/run", tmp_path / "b/run"]
    assert names_of(paths[:1]) == ["run"] and names_of(paths) == ["a/run", "b/run"]
    assert names_of([paths[0], paths[0]]) == ["run (1)", "run (2)"]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=2, max_size=400), st.integers(8, 60))
def test_thinned_curves_keep_ends_and_extremes(values, most):
    steps, values = np.arange(len(values)), np.array(values)
    kept, found = thinned(steps, values, most)
    assert len(kept) <= max(most, 2) and (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(found, values[kept])
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    if np.isfinite(values).any():
        assert np.nanmin(found) == np.nanmin(values) and np.nanmax(found) == np.nanmax(values)
    assert np.isnan(values).any() == np.isnan(found).any(), "a gap must stay visible"


def test_hidden_characters_are_named():
    text = "a\N{RIGHT-TO-LEFT OVERRIDE}b\x00\x1b[31m\n\t\ud83d\N{LINE SEPARATOR}\N{ZERO WIDTH JOINER}<b>"
    assert visible(text) == "a⟨U+202E⟩b⟨U+0000⟩⟨U+001B⟩[31m\n\t⟨U+D83D⟩⟨U+2028⟩\N{ZERO WIDTH JOINER}<b>"
    assert visible("x" * 30, 10) == "x" * 10 + " … (20 more characters)"
