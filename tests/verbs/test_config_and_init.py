"""Tests that `dpo-engine config` prints valid run configurations and the schema, and that `init` writes a run file."""

import json

import pytest
import yaml

from dpo_engine import cli
from dpo_engine.config.errors import dotted_names
from dpo_engine.config.file import parse
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.objective.losses import LOSSES, loss_options
from dpo_engine.verbs.config import commented, schema
from dpo_engine.verbs.init import init
from support.small_run import write_pairs
from support.tiny_tokenizers import piece_model

SMALLEST = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "train": {"output_dir": "o"}}


def test_without_a_run_every_key_has_its_default_and_its_meaning():
    text = commented()
    raw = parse(text, "defaults")
    for section, values in SMALLEST.items():
        raw[section] |= values
    assert Config.parse(raw) == Config.parse(SMALLEST | {"loss": raw["loss"]})
    lines = text.splitlines()
    for dotted in dotted_names(Config):
        section, _, name = dotted.partition(".")
        optional = Config.model_fields[section].default is None
        if name and "." not in name and not optional:
            number = next(
                i for i, line in enumerate(lines) if line in (f"  # {name}:",) or line.startswith(f"  {name}: ")
            )
            assert lines[number - 1].startswith("  # "), f"{dotted} has no comment"
        elif name:
            assert f"#   {name} (" in text, dotted
    assert "# path:" in text and "(or fp32, bf16)" in " ".join(text.replace("#", " ").split())


def test_a_run_is_printed_with_its_values_and_loads_again(tmp_path):
    config = Config.parse(
        SMALLEST
        | {
            "loss": {"name": "simpo", "gamma": 1.25},
            "optim": {"lr": 1.23456789e-5},
            "logging": {"wandb": {"project": "a: b # c"}},
            "data": {"train": [{"path": "1", "weight": 0.5}, "yes"]},
        }
    )
    text = commented(config)
    again = Config.parse(parse(text, "printed"))
    options = {name: option.default for name, option in loss_options(LOSSES["simpo"]).items()}
    assert again.loss.options == {**options, "gamma": 1.25}
    assert again.model_copy(update={"loss": config.loss}) == config


def test_unregistered_loss_is_named_in_the_error():
    with pytest.raises(ConfigError, match="loss.name=sigmod: no such loss; did you mean sigmoid"):
        commented(Config.parse(SMALLEST | {"loss": {"name": "sigmod"}}))


def test_command_prints_all_keys_or_a_run_or_the_schema(tmp_path, capsys):
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == commented()
    assert cli.main(["config", "model.path=m", "data.train=d", "train.output_dir=o", "parallel.tp=4"]) == 0
    assert parse(capsys.readouterr().out, "printed")["parallel"]["tp"] == 4
    assert cli.main(["config", "parallel.tp=4"]) == 2
    assert "model.path: is required" in capsys.readouterr().err
    assert cli.main(["config", "--schema"]) == 0
    assert capsys.readouterr().out == schema()


def test_the_schema_has_every_key_with_its_meaning():
    found = json.loads(schema())
    for name, field in Config.model_fields.items():
        place = found["properties"][name]
        if "$ref" in place:
            section = found["$defs"][place["$ref"].rpartition("/")[2]]
            assert set(section["properties"]) == set(field.annotation.model_fields)
            assert all("description" in key for key in section["properties"].values())
    assert set(found["required"]) == {"model", "data", "train"}
    assert found["$defs"]["ModelConfig"]["additionalProperties"] is False


def test_file_written_by_init_passes_the_check(tiny_hf, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_pairs(tmp_path / "train.jsonl", 40)
    model = str(tiny_hf("llama"))
    assert cli.main(["init", "--model", model, "--data", data, "--to", "first.yaml"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wrote first.yaml", "next: dpo-engine check first.yaml"]
    config = Config.load("first.yaml")
    assert (config.model.path, config.data.train[0].path, config.train.output_dir) == (model, data, "runs/first")
    assert config.data.validation_fraction > 0 and config.train.eval_interval > 0
    tokenizer = piece_model(tmp_path / "tok.model")
    assert cli.main(["check", "first.yaml", f"model.tokenizer={tokenizer}", "data.max_length=64"]) == 0
    assert "# " in (tmp_path / "first.yaml").read_text()


def test_init_with_validation_data(tmp_path):
    path = init("m", "d.jsonl", tmp_path / "run.yaml", validation="v.jsonl", output_dir="o")
    config = Config.load(path)
    assert config.data.validation[0].path == "v.jsonl" and config.data.validation_fraction == 0


def test_init_does_not_overwrite_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="already exists; pass another file, or remove this one"):
        init("m", "d.jsonl", path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("model", ["yes", "1.5", "a: b", "a # b", "'", "null"])
def test_names_with_special_meaning_in_yaml_are_quoted(model, tmp_path):
    assert Config.load(init(model, "d.jsonl", tmp_path / "run.yaml")).model.path == model
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())
