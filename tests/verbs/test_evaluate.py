"""Tests of `dpo-engine eval` and `compare`.

In every layout, the numbers of every pair must be those of transformers. `eval` must evaluate the requested checkpoint
or, by default, the newest checkpoint.
"""

import json
import math
import os
import subprocess
import sys

import pyarrow.parquet
import pytest

from dpo_engine import cli
from dpo_engine.reporting.pair_file import read_evaluation
from dpo_engine.testing.ranks import run_ranks
from support.jobs import run_job
from support.small_run import config_of, write_pairs

LAYOUTS = {
    "one": (1, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2, a ragged end": (2, {}),
    "dp3, more ranks than the last micro-batch has pairs": (3, {}),
}


def judge(config, **asked):
    from dpo_engine.errors import EngineError
    from dpo_engine.verbs.evaluate import evaluate

    try:
        return evaluate(config, **asked)
    except EngineError as error:
        return type(error).__name__, str(error)


def rows_of(path):
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def weighted(files, tmp_path_factory):  # noqa: F811
    """Write a file of 7 held-out pairs and a file of 4. Every pair has a weight. Return the paths of the files."""
    folder = tmp_path_factory.mktemp("weighted")
    paths = []
    for name, count, start in (("a.jsonl", 7, 100), ("b.jsonl", 4, 300)):
        path = folder / name
        write_pairs(path, count, start)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "weight": 1.0 + i % 3}) + "\n" for i, row in enumerate(rows)))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def other(tiny_hf):
    """Return a reference whose weights differ from the policy's, so that margins are not zero."""
    return tiny_hf("llama", rope_theta=10000.0, initializer_range=0.03)


@pytest.fixture(scope="module")
def expected(files, weighted, other, tiny_hf, tmp_path_factory):  # noqa: F811
    """Return the expected numbers of every pair, from scores of transformers and the formulas of DPO."""
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_engine.data.tokenize import build_dataset
    from dpo_engine.data.tokenizer import load_tokenizer
    from dpo_engine.testing.hf_training import sequence_logp

    config = config_of(files, tiny_hf("llama"), tmp_path_factory.mktemp("x"), data={"validation": weighted})
    pairs, _ = build_dataset(
        config.data.validation, load_tokenizer(config.tokenizer_path, None), config.data, config.cache_dir
    )
    models = {
        prefix: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for prefix, path in (("", config.model.path), ("ref_", other))
    }
    rows = []
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            row = {
                f"{prefix}{name}_logps": sequence_logp(model, pair.prompt, getattr(pair, name)).item()
                for prefix, model in models.items()
                for name in ("chosen", "rejected")
            }
            for name in ("chosen", "rejected"):
                row[f"{name}_rewards"] = 0.1 * (row[f"{name}_logps"] - row[f"ref_{name}_logps"])
                row[f"{name}_tokens"] = len(getattr(pair, name))
            row["margin"] = row["chosen_rewards"] - row["rejected_rewards"]
            row["accuracy"] = float(row["margin"] > 0)
            row["loss"] = math.log1p(math.exp(-row["margin"]))
            row |= {"index": i, "id": pair.digest, "weight": 1.0 + (i if i < 7 else i - 7) % 3}
            row |= {"source": weighted[i >= 7], "prompt_tokens": len(pair.prompt)}
            rows.append(row)
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pair_matches_transformers(name, expected, files, weighted, other, tiny_hf, tmp_path):  # noqa: F811
    ranks, layout = LAYOUTS[name]
    config = config_of(
        files,
        tiny_hf("llama"),
        tmp_path,
        data={"validation": weighted, "train": str(tmp_path / "not read.jsonl")},
        reference={"path": str(other)},
        parallel=layout,
    )
    found = run_ranks(judge, ranks, config=config, step=0)
    assert all(report == {} for report in found[1:])
    path = tmp_path / "eval/step_00000000.parquet"
    assert found[0]["files"] == [str(path), str(path.with_suffix(".json"))]
    rows = rows_of(path)
    assert [row["index"] for row in rows] == list(range(11))
    for row, pair in zip(rows, expected, strict=True):
        for column, value in pair.items():
            assert row[column] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-5)), (
                column
            )
    assert len({row["prompt_id"] for row in rows}) == 11
    (everything, first, second, *lengths) = found[0]["groups"]
    assert [group["name"] for group in (everything, first, second)] == ["all pairs", *weighted]
    weights = [pair["weight"] for pair in expected]
    for measure in ("accuracy", "margin"):
        mean = sum(w * pair[measure] for w, pair in zip(weights, expected, strict=True)) / sum(weights)
        assert everything[measure]["mean"] == pytest.approx(mean, rel=1e-4)
        assert everything[measure]["low"] <= mean <= everything[measure]["high"]
    assert sum(group["pairs"] for group in lengths) == 11
    facts = read_evaluation(path).facts
    assert facts["loss"]["beta"] == 0.1 and facts["reference"] == str(other) and facts["step"] == 0


def train_one_step(config):
    from dpo_engine.verbs.train import train

    return train(config)


@pytest.fixture(scope="module")
def trained(files, tiny_hf, tmp_path_factory):  # noqa: F811
    """Train two steps, with a checkpoint after each step. Return the output directory."""
    output = tmp_path_factory.mktemp("trained")
    config = config_of(
        files, tiny_hf("llama"), output, parallel={"tp": 2}, train={"max_steps": 2}, checkpoint={"save_interval": 1}
    )
    run_ranks(train_one_step, 2, config=config)
    return output


def test_checkpoint_in_another_layout_matches_training(trained, files, tiny_hf, tmp_path):  # noqa: F811
    """Evaluate the newest checkpoint in one process. The result must match that of the training run on two ranks."""
    config = config_of(files, tiny_hf("llama"), trained)
    seen = trained / "eval/step_00000002.parquet"
    to = tmp_path / "again.parquet"
    found = run_ranks(judge, 1, config=config, to=str(to), against=str(seen))[0]
    again, before = rows_of(to), rows_of(seen)
    assert len(again) == len(before) == 7
    for row, expected in zip(again, before, strict=True):
        for column, value in expected.items():
            assert row[column] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-5)), (
                column
            )
    comparison = found["against"]
    assert (comparison["common"], comparison["tied"], comparison["other_units"]) == (7, 7, [])
    assert comparison["margin"]["mean"] == pytest.approx(0, abs=1e-5)
    start = run_ranks(judge, 1, config=config, step=0, to=str(tmp_path / "start.parquet"), against=str(seen))[0]
    assert start["run"]["step"] == 0 and start["against"]["steps"] == [0, 2]
    (all_pairs, *_) = start["groups"]
    assert all_pairs["loss"] == pytest.approx(math.log(2)) and all_pairs["accuracy"]["mean"] == 0.5
    expected = -sum(row["margin"] for row in before) / 7
    assert start["against"]["margin"]["mean"] == pytest.approx(expected, rel=1e-4)
    older = run_ranks(judge, 1, config=config, step=1, to=str(tmp_path / "one.parquet"))[0]
    assert older["run"]["step"] == 1


def test_updated_reference_configured_after_training(trained, files, tiny_hf, tmp_path):  # noqa: F811
    """The checkpoints were saved before `reference.sync_every` was set, so they do not contain reference weights."""
    config = config_of(files, tiny_hf("llama"), trained, reference={"sync_every": 1})
    found = run_ranks(judge, 1, config=config, to=str(tmp_path / "x.parquet"))[0]
    seen = rows_of(trained / "eval/step_00000002.parquet")
    expected = [row["ref_chosen_logps"] for row in seen]
    assert [row["ref_chosen_logps"] for row in rows_of(found["files"][0])] == pytest.approx(expected, rel=1e-5)


def test_any_file_can_be_evaluated(trained, files, tiny_hf, tmp_path, capfd):  # noqa: F811
    """Evaluate new pairs and training pairs for a run whose configuration names no validation data."""
    write_pairs(tmp_path / "new.jsonl", 5, 500)
    trained_on = open(files["train"]).read().splitlines()[:3]
    (tmp_path / "known.jsonl").write_text("\n".join(trained_on) + "\n")
    config = config_of(files, tiny_hf("llama"), trained, data={"validation": None})
    own = {path.name: path.read_bytes() for path in (trained / "eval").iterdir()}
    found = run_ranks(judge, 1, config=config, data=f"{tmp_path}/new.jsonl,{tmp_path}/known.jsonl")[0]
    path = trained / "eval/step_00000002_new_known.parquet"
    assert found["files"] == [str(path), str(path.with_suffix(".json"))]
    assert own == {name: (trained / "eval" / name).read_bytes() for name in own}, "eval must not change earlier files"
    assert "held-out pairs: 3 of 8 are also training pairs of the run\n" in capfd.readouterr().out
    rows = rows_of(path)
    assert [row["source"].rpartition("/")[2] for row in rows] == ["new.jsonl"] * 5 + ["known.jsonl"] * 3
    # Compute the likelihood accuracy from the file's columns. This accuracy does not involve the reference.
    share = sum(row["chosen_logps"] > row["rejected_logps"] for row in rows) / 8
    assert found["groups"][0]["likelihood_accuracy"]["mean"] == pytest.approx(share)
    (tmp_path / "other").mkdir()
    write_pairs(tmp_path / "other/new.jsonl", 4, 700)
    names = f"{tmp_path}/other/new.jsonl,{tmp_path}/known.jsonl"
    says = f"--data={names}: {path} contains an evaluation of other data; pass --to FILE.parquet"
    assert run_ranks(judge, 1, config=config, data=names)[0] == ("ConfigError", says)
    path.unlink()
    path.with_suffix(".json").unlink()
    frozen = config.model_copy(update={"optim": config.optim.model_copy(update={"freeze": ("lm_head.weight",)})})
    kind, says = run_ranks(judge, 1, config=frozen, data=f"{tmp_path}/new.jsonl")[0]
    assert kind == "CheckpointError" and "optim.freeze" in says and "the saved optimizer state does not fit" in says


@pytest.mark.slow
def test_eval_of_another_file_by_command(trained, files, tiny_hf, tmp_path):  # noqa: F811
    """The run's own held-out file need not exist. A source can be a mapping that names columns."""
    run = tmp_path / "run.yaml"
    gone = {"validation": str(tmp_path / "gone.jsonl")}
    run.write_text(config_of(files, tiny_hf("llama"), trained, data=gone).to_yaml(), encoding="utf-8")
    command = ["eval", str(run), "--step", "0", "--to", str(tmp_path / "a.parquet")]
    job = run_job([*command, "--data", files["validation"]], 1, tmp_path / "log1")
    assert job.codes == [0], job.said
    assert "likelihood accuracy (chosen more likely than rejected): " in job.output[0] and "also" not in job.output[0]
    job = run_job([*command, "--data", f"{files['validation']},{tmp_path}/none.jsonl"], 1, tmp_path / "log2")
    assert job.codes == [2] and f"--data={tmp_path}/none.jsonl: no such file; " in job.said
    sources = [{"path": files["validation"], "columns": {"prompt": "prompt"}}]
    config = config_of(files, tiny_hf("llama"), trained, data={"validation": None, "validation_fraction": 0.2})
    found = run_ranks(judge, 1, config=config, step=0, data=sources, to=str(tmp_path / "b.parquet"))[0]
    assert found["groups"][0]["pairs"] == 7


def test_validation_fraction_holds_out_training_pairs(files, tiny_hf, tmp_path):  # noqa: F811
    data = {"validation": None, "validation_fraction": 0.3}
    config = config_of(files, tiny_hf("llama"), tmp_path, data=data, loss={"name": "simpo"}, reference={"mode": "none"})
    found = run_ranks(judge, 1, config=config, step=0)[0]
    rows = rows_of(found["files"][0])
    assert 0 < len(rows) < 22 and {row["source"] for row in rows} == {files["train"]}
    assert found["run"]["reference"] is None and {row["ref_chosen_logps"] for row in rows} == {None}
    for row in rows:  # rewards are sums over tokens, although SimPO's loss compares averages
        assert row["chosen_rewards"] == pytest.approx(2.0 * row["chosen_logps"], rel=1e-5)


def test_impossible_evaluation_is_refused_by_all_ranks(trained, files, tiny_hf, tmp_path):  # noqa: F811
    config = config_of(files, tiny_hf("llama"), tmp_path)
    outcomes = run_ranks(judge, 2, config=config)
    says = f"{tmp_path}/checkpoints: contains no checkpoint; train first, or evaluate model.path with --step 0"
    assert outcomes == [("CheckpointError", says)] * 2
    kind, message = run_ranks(judge, 1, config=config_of(files, tiny_hf("llama"), trained), step=9)[0]
    assert kind == "CheckpointError" and "contains no checkpoint for step 9; available steps: 1, 2" in message
    missing = str(tmp_path / "no.parquet")
    outcomes = run_ranks(judge, 2, config=config, step=0, against=missing)
    assert (
        outcomes == [("DataError", f"{missing}: no such file; give a file written by `dpo-engine eval` or `train`")] * 2
    )
    assert judge(config, to="x.csv") == (
        "ConfigError",
        "--to=x.csv: must end with .parquet; pass --to FILE.parquet (the summary goes to FILE.json)",
    )
    nothing = config_of(files, tiny_hf("llama"), tmp_path, data={"validation": None})
    kind, message = judge(nothing, step=0)
    assert kind == "ConfigError"
    assert message == (
        "data.validation=null: evaluation needs validation data; set data.validation or data.validation_fraction, "
        "or pass --data FILE"
    )


def judge_broken(config):
    """Evaluate a policy whose output layer has nan in every weight of one token."""
    from dpo_engine.training.engine import Engine

    load = Engine.load_model

    def spoiled(self, path, **rest):
        chunks = load(self, path, **rest)
        if "key" not in rest:  # only for the policy
            for chunk in chunks:
                list(chunk.parameters())[-1].data[5] = float("nan")
        return chunks

    Engine.load_model = spoiled
    return judge(config, step=0)


def test_non_finite_values_are_written_and_refused(files, tiny_hf, tmp_path):  # noqa: F811
    outcome = run_ranks(judge_broken, 1, config=config_of(files, tiny_hf("llama"), tmp_path))[0]
    path = tmp_path / "eval/step_00000000.parquet"
    says = f"step 0: values are not finite in 7 of 7 pairs; inspect {path}"
    assert outcome == ("NumbersError", says)
    assert len(rows_of(path)) == 7 and not path.with_suffix(".json").exists()


def test_command_line_evaluates_and_compares(trained, files, tiny_hf, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = tmp_path / "run.yaml"
    run.write_text(config_of(files, tiny_hf("llama"), trained).to_yaml(), encoding="utf-8")
    seen, to = trained / "eval/step_00000002.parquet", tmp_path / "start.parquet"
    command = [sys.executable, "-m", "dpo_engine", "eval", str(run), "--step", "0", "--to", str(to)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--against", str(seen)], capture_output=True, text=True, env=settings, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "held-out pairs: 7 pairs from 7 records" in done.stdout and "\x1b" not in done.stdout
    assert "all pairs" in done.stdout and "7 pairs in common" in done.stdout
    assert done.stdout.endswith(f"wrote {to}\nwrote {to.with_suffix('.json')}\n")
    assert json.loads(to.with_suffix(".json").read_text())["against"]["common"] == 7
    assert cli.main(["compare", str(seen), str(to)]) == 0
    out = capsys.readouterr().out
    assert f"first:  {seen} (step 2)" in out and "accuracy" in out
    assert cli.main(["compare", str(seen), str(run)]) == 3
    assert capsys.readouterr().err.startswith(f"{run}: cannot be read as Parquet (")
