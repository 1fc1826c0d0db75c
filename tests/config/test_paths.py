"""Tests of `~` and environment variables in the paths of a run and of command-line options."""

import os
from pathlib import Path

import pytest

from dpo_engine.config.paths import expand
from dpo_engine.config.run import Config, draft
from dpo_engine.errors import ConfigError

SMALLEST = ("model.path=m", "data.train=d", "train.output_dir=o")
PLACES = (
    *("model.path", "model.tokenizer", "data.chat_template", "data.cache_dir"),
    *("reference.path", "reference.store", "train.output_dir", "adapter.path"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/ann")
    monkeypatch.setenv("DATA", "/big")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("NESTED", "a$DATA")
    monkeypatch.delenv("NOPE", raising=False)


@pytest.mark.parametrize(
    ("written", "expanded"),
    [
        ("~", "/homes/ann"),
        ("~/runs", "/homes/ann/runs"),
        ("$DATA/a", "/big/a"),
        ("x/${DATA}b$HOME", "x//bigb/homes/ann"),
        ("a~", "a~"),
        ("./~x", "./~x"),
        ("cost$", "cost$"),
        ("a$5.jsonl", "a$5.jsonl"),
        ("org/name@v1", "org/name@v1"),
        ("data/[ab]*.jsonl[-5%:]", "data/[ab]*.jsonl[-5%:]"),
    ],
)
def test_expansion(written, expanded):
    assert expand(written) == expanded == expand(expanded)


@pytest.mark.parametrize("key", PLACES)
def test_paths_of_a_run_are_expanded(key):
    config = draft(None, [*SMALLEST, f"{key}=~/$DATA"]).config
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == "/homes/ann//big"


def test_sources_are_expanded_in_every_form():
    config = draft(None, [*SMALLEST, "data.train=[$DATA/a, {path: ~/b}]", "data.validation=$DATA/c"]).config
    assert [source.path for source in config.data.train] == ["/big/a", "/homes/ann/b"]
    assert [source.path for source in config.data.validation] == ["/big/c"]


def test_recorded_configuration_has_expanded_paths_and_does_not_change(monkeypatch, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: ~/m}\ndata: {train: $DATA/d}\ntrain: {output_dir: '${DATA}/o'}\n")
    config = Config.load(path)
    assert (config.model.path, str(config.checkpoint_dir)) == ("/homes/ann/m", "/big/o/checkpoints")
    path.write_text(config.to_yaml())
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("DATA", "/elsewhere")
    assert Config.load(path) == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "train.output_dir=$NOPE/x",
            "train.output_dir=$NOPE/x: must be a path whose variables are set, but NOPE is unset or empty; set "
            "NOPE, or write the path in full",
        ),
        (
            "data.train=[a, '${EMPTY}/x']",
            "data.train[1].path=${EMPTY}/x: must be a path whose variables are set, but EMPTY is unset or empty; set "
            "EMPTY, or write the path in full",
        ),
        (
            "data.cache_dir='${DATA:-x}'",
            "data.cache_dir=${DATA:-x}: must be a path with variables of the form $NAME or ${NAME}, not '${DATA:-x}'; "
            "write the path in full",
        ),
        (
            "data.cache_dir=$(pwd)",
            "data.cache_dir=$(pwd): must be a path with variables of the form $NAME or ${NAME}, not '$('; write the "
            "path in full",
        ),
        (
            "reference.store=~nobody-here/x",
            "reference.store=~nobody-here/x: must be a path whose home directory is known, but there is no user "
            "nobody-here; write the path in full",
        ),
        (
            "model.path=$NESTED",
            "model.path=$NESTED: must be a path whose variables expand to text without variables, but it expands to "
            "a$DATA; write the path in full",
        ),
    ],
)
def test_path_that_cannot_be_expanded_is_reported_in_one_line(override, line):
    assert draft(None, [*SMALLEST, override]).problems == [line]


def test_unknown_home_is_an_error(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="home directory is known, but HOME is not set; write the path in full"):
        expand("~/x")


def test_base_file_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    (tmp_path / "base.yaml").write_text("model: {path: m}\n")
    path = tmp_path / "run.yaml"
    path.write_text("base: $DATA/base.yaml\ndata: {train: d}\ntrain: {output_dir: o}\n")
    assert Config.load(path).model.path == "m"
    path.write_text("base: $NOPE/base.yaml\n")
    with pytest.raises(ConfigError) as error:
        Config.load(path)
    (line,) = error.value.problems
    assert line.startswith(
        f"{path}: base=$NOPE/base.yaml: must be a path whose variables are set, but NOPE is unset or empty"
    )


@pytest.mark.parametrize("value", ["a\udcff", "a\x01"])
def test_override_that_yaml_cannot_contain_is_reported_in_one_line(value):
    (line,) = draft(None, [*SMALLEST, f"data.cache_dir={value}"]).problems
    assert line.startswith("data.cache_dir: is not valid YAML (unacceptable character #x")


def test_no_file_is_looked_up(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: pytest.fail("expanding a path must not look for files"))
    assert expand("$DATA/x") == "/big/x"


def test_paths_of_options_are_expanded(capsys):
    from dpo_engine.verbs.arguments import build_parser

    parser = build_parser(["init"])
    given = ["--model", "~/m", "--data=$DATA/d", "--validation=$DATA/v", "--output-dir=~/o", "--to=${DATA}/run.yaml"]
    asked = parser.parse_args(["init", *given])
    assert (asked.model, asked.data, asked.validation) == ("/homes/ann/m", "/big/d", "/big/v")
    assert (asked.output_dir, asked.to) == ("/homes/ann/o", "/big/run.yaml")
    for words in (
        ["export", "--to=$DATA/x"],
        ["eval", "--to=$DATA/x", "--against=$DATA/x"],
        ["compare", "$DATA/x", "~"],
    ):
        asked = parser.parse_args(words)
        assert {"/big/x"} >= {getattr(asked, name) for name in ("to", "against", "first") if hasattr(asked, name)}
    with pytest.raises(SystemExit):
        parser.parse_args(["export", "--to=$NOPE/x"])
    line = capsys.readouterr().err.splitlines()[-1]
    rule = "must be a path whose variables are set, but NOPE is unset or empty; set NOPE, or write the path in full"
    assert line.endswith(f"argument --to: $NOPE/x: {rule}")
