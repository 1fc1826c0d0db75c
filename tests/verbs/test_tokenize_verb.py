"""Tests of ``dpo-engine tokenize``: it fills the cache that ``train`` reads, and does not import Megatron."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine import cli
from support.jobs import run_job

ROOT = Path(__file__).parents[2]


def test_train_reads_the_cache(run_yaml, capsys, tmp_path):
    path = str(run_yaml(data={"cache_dir": str(tmp_path / "cache")}))
    assert cli.main(["tokenize", path]) == 0
    said = capsys.readouterr().out
    assert "training pairs: 24 pairs from 24 records\n" in said and "held-out pairs: 4 pairs from 4 records\n" in said
    assert said.endswith(f"cache: {tmp_path / 'cache'}\n")
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("pairs-*.arrow")}
    assert len(made) == 2
    # Train in a separate process. If the process of pytest opened process groups, later tests would hang, because they
    # fork their ranks from the process of pytest.
    trained = run_job(["train", path, "train.max_steps=2"], 1, tmp_path / "log")
    assert trained.codes == [0], trained.said
    assert "training pairs: 24 pairs from 24 records, from the cache" in trained.output[0]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("pairs-*.arrow")} == made


@pytest.mark.slow
def test_megatron_is_not_imported(run_yaml):
    program = (
        "import sys\nfrom dpo_engine.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not any(name.split('.')[0] == 'megatron' for name in sys.modules)\nsys.exit(code)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, "tokenize", str(run_yaml())],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_bad_record_is_named(run_yaml, tmp_path, capsys):
    rows = [{"prompt": f"{n} ?", "chosen": " a", "rejected": " b"} for n in range(20)]
    rows[15]["chosen"] = ""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["tokenize", str(run_yaml(data={"train": str(data), "validation": None}))]) == 3
    assert capsys.readouterr().err.startswith(f"{data}:16: chosen is empty")


def test_field_that_the_loss_reads_is_required(run_yaml, tmp_path, capsys):
    """Before tokenizing, the command checks only the first records. After tokenizing, it checks all records."""
    rows = [{"prompt": f"{n} ?", "chosen": " a", "rejected": " b", "margin": 1.0} for n in range(20)]
    del rows[15]["margin"]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": {"train": str(data), "validation": None}, "loss": {"name": "sigmoid", "margin_scale": 1.0}}
    assert cli.main(["tokenize", str(run_yaml(**settings))]) == 3
    assert (
        "needs margin in every record of data.train, but margin is missing in 1 of 20 pairs" in capsys.readouterr().err
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_rank_tokenizes(rank, run_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = run_yaml(data={"cache_dir": str(tmp_path / "cache")})
    assert cli.main(["tokenize", str(path)]) == 0
    assert (tmp_path / "cache").exists() == (rank == "0")
