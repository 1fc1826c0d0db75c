"""Tests of reading a run's directory, of reducing curves to fewer points, and of showing hidden characters."""

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
    assert np.isnan(run.series["loss"].values[0]), "if a step has several values, the last one must count"
    assert "text" not in run.series
    assert run.evaluation is None and not run.summaries, (
        "evaluations after the last step with metrics are from an earlier start"
    )
    assert run.problems == [
        f"{folder}/eval/step_00000020.json: is not a summary of an evaluation; run the evaluation again",
        f"{folder}/config.yaml: is not the configuration of a run",
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "eval/step_00000060.tokens.parquet").write_bytes(b"x")
    run = read_run(folder, "run")
    assert len(run.problems) == 2 and "is not a readable token file" in run.no_tokens
    command = f"To write the file: dpo-engine eval {folder}/config.yaml --step 60 --tokens 64"
    assert run.no_tokens.endswith(f". {command}") and "again" not in run.no_tokens
    (folder / "eval/step_00000060.tokens.parquet").unlink()
    path = folder / "eval/step_00000060.tokens.parquet"
    assert read_run(folder, "run").no_tokens == f"{path}: does not exist. {command}"
    write_tokens(path, [], {})
    assert read_run(folder, "run").no_tokens == f"{path}: contains no pairs. {command}"
    (folder / "checkpoints/step_00000060").rename(folder / "checkpoints/step_00000040")
    why = f"{path}: contains no pairs, and step 60 has no checkpoint."
    way_out = "A run with logging.token_samples=64 writes tokens at each evaluation"
    assert read_run(folder, "run").no_tokens == f"{why} {way_out}"
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
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path, "contains no metrics.jsonl and no evaluations"),
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_run(path, "x")
        assert str(caught.value) == f"{path}: {says}; pass the train.output_dir of a run"


def test_lines_with_impossible_numbers_are_tolerated(tmp_path):
    huge = "9" * 400
    lines = ['{"step": 1, "loss": 0.5, "a": 1}', '{"step": 1e400, "loss": 1}', f'{{"step": {huge}, "loss": 1}}']
    lines += [f'{{"step": 2, "loss": {huge}}}', '{"step": 3, "loss": 1e400, "a": NaN}', '{"step": NaN, "loss": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path, "x")
    assert run.series["loss"].steps.tolist() == [1, 3] == run.series["a"].steps.tolist()
    np.testing.assert_array_equal(run.series["loss"].values, [0.5, np.nan])
    assert (run.has_reference, run.per_token, run.accuracy) == (True, False, "accuracy")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rewards/margins": 0.1, "loss_margin/accuracies": 0.5}')
    run = read_run(tmp_path, "x")
    assert (run.has_reference, run.per_token) == (False, True) and run.accuracy == "likelihood_accuracy_per_token"


def test_the_log_says_whether_a_run_goes_on(tmp_path):
    folder = write_directory(tmp_path / "run", steps=60, every=20, count=20, shown=2)
    log, day = (folder / "log.txt").read_text(), "2026-01-02 03:04:05"
    started = f"{log}{day} --- started again after step 60 of 90, process 9 on host ---\n"
    for text, running in (
        (log, False),
        (started, True),
        (f"{started}{day} the run ends after step 60 of 90: early_stopping: no gain\n", False),
        (f"{started}{day} ended: a rank was lost\n", False),
        (f"{started}{day} the run ends after step 60 of 90: x: y\n{started}", True),
    ):
        (folder / "log.txt").write_text(text)
        assert read_run(folder, "run").running is running
    for name in ("step_00000020.2", "step_00000040.tmp.5d0c81ab"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "manifest.json").write_text("{}")
    assert read_run(folder, "run").kept == [20, 60]


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
