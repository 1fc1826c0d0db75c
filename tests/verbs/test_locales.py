"""Tests of non-ASCII paths with an ASCII locale or console: the console shows escapes, and files are UTF-8."""

import os
import subprocess
import sys

import pytest

from dpo_engine.config.run import Config

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}
LOCALES = [
    ASCII,
    pytest.param({**ASCII, "PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
    pytest.param({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
]


def command(folder, *arguments, locale):
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "PYTHONIOENCODING")}
    words = [sys.executable, "-m", "dpo_engine", *arguments]
    return subprocess.run(words, capture_output=True, cwd=folder, env={**env, **locale}, timeout=120)


@pytest.mark.parametrize("locale", LOCALES)
def test_console_shows_paths_with_escapes(tmp_path, locale):
    written = command(tmp_path, "init", "--model=mödel", "--data=d/日.jsonl", "--to=rün.yaml", locale=locale)
    assert (written.returncode, written.stderr) == (0, b"")
    assert written.stdout == b"wrote r\\xfcn.yaml\nnext: dpo-engine check r\\xfcn.yaml\n"
    config = Config.load(tmp_path / "rün.yaml")
    assert (config.model.path, config.data.train[0].path) == ("mödel", "d/日.jsonl")


@pytest.mark.slow
def test_document_is_utf8_in_a_file_and_errors_have_escapes(tmp_path):
    (tmp_path / "rün.yaml").write_text("model: {path: mödel}\ndata: {train: d}\ntrain: {output_dir: o}\n", "utf-8")
    (tmp_path / "whole.yaml").write_bytes(command(tmp_path, "config", "rün.yaml", locale=ASCII).stdout)
    assert Config.load(tmp_path / "whole.yaml").model == Config.load(tmp_path / "rün.yaml").model
    absent = command(tmp_path, "config", b"r\xff.yaml", locale=ASCII)
    expected = b"r\\udcff.yaml: cannot be read (No such file or directory); pass the path of a run's YAML file\n"
    assert (absent.returncode, absent.stderr) == (2, expected)


@pytest.mark.slow
def test_whole_run_in_an_ascii_locale(run_yaml, tmp_path):
    run = run_yaml("rün", train={"max_steps": 2}, optim={"warmup_steps": 0}, checkpoint={"export": True})
    (tmp_path / "dåta.jsonl").write_bytes(next(tmp_path.parent.parent.rglob("train.jsonl")).read_bytes())
    locale = {**ASCII, "PYTHONIOENCODING": "ascii"}
    for verb, progress in (("train", "rich"), ("train", "plain"), ("eval", "plain"), ("inspect", "plain")):
        words = (verb, str(run), "data.train=dåta.jsonl", f"logging.progress={progress}")
        done = command(tmp_path, *words, locale=locale)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and b"Traceback" not in done.stderr
        assert (b"d\\xe5ta" if verb == "inspect" else b"r\\xfcn") in done.stdout
    assert "dåta.jsonl" in (tmp_path / "rün" / "config.yaml").read_text("utf-8")
