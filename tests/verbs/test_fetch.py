"""Tests of `fetch` against a local server, and of a run that then uses the Hub's cache without a network."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from dpo_engine import cli
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.verbs.fetch import fetch, hub_ids
from support.hub_server import use_hub
from support.small_run import write_pairs
from support.tiny_tokenizers import piece_model


@pytest.fixture
def published(server, tmp_path, tiny_hf):
    """Publish a tiny model with its tokenizer, and a data set with two splits. Return the model's commit."""
    model = tmp_path / "model"
    shutil.copytree(tiny_hf("llama", num_hidden_layers=2), model)
    piece_model(model / "tokenizer.model")
    (model / "pytorch_model.bin").write_text("pickle")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "train.jsonl", 16)
    write_pairs(pairs / "test.jsonl", 4, start=16)
    server.add("dataset", "org/pairs", pairs, "v1")
    return server.add("model", "org/tiny", model)


def run_file(tmp_path, **sections):
    raw = {
        "model": {"path": "org/tiny"},
        "data": {"train": "org/pairs@v1:train[:-50%]", "validation": "org/pairs@v1:train[-50%:]", "max_length": 64},
        "train": {"output_dir": str(tmp_path / "out"), "global_batch_size": 4, "max_steps": 1},
        "logging": {"progress": "off", "page": False, "token_samples": 0},
    }
    for name, values in sections.items():
        raw[name] = {**raw[name], **values}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return str(tmp_path / "run.yaml")


@pytest.mark.slow
def test_fetched_run_trains_without_a_network(published, server, tmp_path, capsys):
    path = run_file(tmp_path, data={"max_pairs": 6})
    assert cli.main(["fetch", path]) == 0
    told = capsys.readouterr().out.splitlines()
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / published
    assert told[0] == f"model.path=org/tiny: commit {published} in {snapshot}"
    assert [line.partition(":")[0] for line in told[1:]] == ["data.train[0].path=org/pairs@v1"] + [
        "data.validation[0].path=org/pairs@v1"
    ]
    assert not (snapshot / "pytorch_model.bin").exists()
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dpo_engine", "train", path], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert kept["model"]["path"] == "org/tiny" and kept["data"]["train"][0]["path"] == "org/pairs@v1:train[:-50%]"
    assert f"Hub model org/tiny: commit {published}" in done.stdout
    assert "stopped after 6 pairs (data.max_pairs): later records are not used" in done.stdout
    (manifest,) = (tmp_path / "out" / "checkpoints").glob("*/manifest.json")
    assert f"Hub model org/tiny: commit {published}" in json.loads(manifest.read_text())["run"]["hub"]
    assert (tmp_path / "out" / "hf" / "tokenizer.model").read_bytes() == (snapshot / "tokenizer.model").read_bytes()


def test_check_downloads_and_then_needs_no_network(published, server, tmp_path, capsys, monkeypatch):
    path = run_file(tmp_path)
    assert cli.main(["check", path]) == 0
    assert "train org/pairs@v1:train[:-50%]: 8 records, format text (auto)" in capsys.readouterr().out
    use_hub(monkeypatch, tmp_path, None)
    assert cli.main(["check", path]) == 0
    use_hub(monkeypatch, tmp_path / "empty", None)
    capsys.readouterr()
    assert cli.main(["check", path]) == ConfigError.exit_code
    problems = capsys.readouterr().err.splitlines()
    assert [line.partition(": not an existing ")[0] for line in problems] == [
        "model.path=org/tiny",
        "data.train[0].path=org/pairs@v1:train[:-50%]",
        "data.validation[0].path=org/pairs@v1:train[-50%:]",
    ]
    assert all("run `dpo-engine fetch RUN.yaml` on a machine with a network" in line for line in problems)


def test_fetch_follows_a_branch(published, server, tmp_path):
    config = Config.load(run_file(tmp_path))
    lines = []
    fetch(config, lines.append)
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    second = server.add("model", "org/tiny", tmp_path / "model")
    assert fetch(config, lines.append)[0].endswith(second) and second != published


def test_fetch_reports_every_problem(published, server, tmp_path):
    other = {"model": {"path": "org/none", "tokenizer": "org/gone"}, "data": {"train": "org/pairs@v1:dev"}}
    config = Config.load(run_file(tmp_path, **other))
    with pytest.raises(ConfigError) as error:
        fetch(config, lambda line: None)
    absent = "the Hub has no such model, or the model is private; correct the name, or set HF_TOKEN"
    assert error.value.problems == [
        f"model.path=org/none: {absent}",
        f"model.tokenizer=org/gone: {absent}",
        "data.train[0].path=org/pairs@v1:dev: not an existing file or directory, and not a usable Hub id: the data set "
        "has no split dev; name one of its splits (test and train), as in org/pairs@v1:test",
    ]


def test_fetch_offline_is_refused(server, tmp_path, monkeypatch):
    config = Config.load(run_file(tmp_path))
    use_hub(monkeypatch, tmp_path, None)
    with pytest.raises(
        ConfigError, match="HF_HUB_OFFLINE=1: forbids downloads, but `fetch` must download; unset HF_HUB_OFFLINE"
    ):
        fetch(config)


def test_run_of_local_files_has_nothing_to_fetch(server, tmp_path):
    (tmp_path / "model").mkdir()
    local = {"model": {"path": str(tmp_path / "model")}, "data": {"train": "a.jsonl", "validation": None}}
    config = Config.load(run_file(tmp_path, **local))
    lines = []
    assert hub_ids(config) == {} and fetch(config, lines.append) == [] and server.asked == []
    assert lines == ["the run names no Hub id: there is nothing to download"]
