"""Tests of the Python interface: its public names, the modules loaded by importing them, and a run from Python."""

import json
import subprocess
import sys

import pytest
import yaml

import dpo_engine
from support.small_run import write_pairs
from support.tiny_tokenizers import piece_model

HEAVY = "{'torch', 'megatron', 'transformers', 'pyarrow'}"


def python(script: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, **options)


def test_importing_the_package_imports_nothing_heavy():
    done = python(f"import sys, dpo_engine; print(dpo_engine.__version__, {HEAVY} & set(sys.modules))")
    assert done.stdout == f"{dpo_engine.__version__} set()\n", done.stderr


def test_names_for_checks_and_plugins_are_imported_without_megatron():
    names = "CALLBACKS, FAMILIES, FORMATS, LOSSES, OPTIMIZERS, SCHEDULES, SINKS, Callback, Config, check"
    done = python(f"import sys; from dpo_engine import {names}; print({{'megatron'}} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_every_public_name_is_there():
    for name in dpo_engine.__all__:
        value = getattr(dpo_engine, name)
        assert value.__doc__ and (name.isupper() or value.__name__ == name)
    assert set(dpo_engine.__all__) <= set(dir(dpo_engine))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        dpo_engine.trian  # noqa: B018


SCRIPT = """
import json, sys
from dpo_engine import Config, check, compare, evaluate, export, score_reference, train

config = Config.load("run.yaml", ["train.epochs=1"])
assert check(config) == []
score_reference(config)
summary = train(config)
first, last = evaluate(config, step=0, to="first.parquet"), evaluate(config, to="last.parquet")
written = export(config, to="exported")
compared = compare("last.parquet", "first.parquet")
found = {"step": summary["step"], "groups": len(last["groups"]), "written": written, "compared": sorted(compared)}
json.dump(found, sys.stderr)
"""


def test_a_run_from_python(tiny_hf, tmp_path):
    tokenizer = str(piece_model(tmp_path / "t.model"))
    raw = {
        "model": {"path": str(tiny_hf("llama", num_hidden_layers=2)), "tokenizer": tokenizer},
        "data": {"train": write_pairs(tmp_path / "train.jsonl", 16), "validation_fraction": 0.25, "max_length": 64},
        "reference": {"mode": "stored"},
        "optim": {"lr": 1e-3},
        "train": {"output_dir": "out", "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"export": False},
        "logging": {"progress": "off", "page": False, "token_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    done = python(SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stderr.splitlines()[-1])
    assert found["step"] >= 3 and found["written"] == "exported" and found["groups"] and found["compared"]
    assert (tmp_path / "exported" / "config.json").exists() and (tmp_path / "out" / "metrics.jsonl").exists()
    assert "16 of 16 pairs stored" in done.stdout


def test_plugin_that_cannot_be_imported_ends_a_run_from_python(tiny_hf, tmp_path):
    raw = {
        "model": {"path": str(tiny_hf("llama"))},
        "data": {"train": "a.jsonl"},
        "train": {"output_dir": str(tmp_path)},
        "plugins": ["no_such_lab"],
    }
    with pytest.raises(dpo_engine.EngineError, match=r"plugins\[0\]=no_such_lab: cannot be imported") as caught:
        dpo_engine.train(dpo_engine.Config.parse(raw))
    assert caught.value.exit_code == 2
