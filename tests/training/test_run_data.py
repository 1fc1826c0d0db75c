"""Tests of a chat template that writes the date: a run that resumes on a later day keeps the first day's date."""

import datetime

import pyarrow.parquet as pq
import pytest
import yaml

from dpo_engine.errors import ConfigError
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.training import run_data
from support.built import write
from support.small_run import config_of, run
from support.tiny_tokenizers import CHATML, byte_level


@pytest.fixture
def dated(tiny_hf, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"which is larger? {n} or {n + 1}"}],
            "chosen": [{"role": "assistant", "content": f"the second: {n + 1}"}],
            "rejected": [{"role": "assistant", "content": "the first"}],
        }
        for n in range(24)
    ]
    tokenizer = byte_level(tmp_path / "tokenizer")
    files = {"train": str(write(tmp_path / "train.jsonl", rows)), "validation": None, "tokenizer": str(tokenizer)}

    def config(max_steps, cache):
        data = {"chat_template": str(template), "validation_fraction": 0.3, "cache_dir": str(tmp_path / cache)}
        return config_of(
            files,
            tiny_hf(),
            tmp_path / "out",
            data=data,
            optim={"schedule": "constant"},
            train={"max_steps": max_steps, "epochs": 9},
        )

    return config


def test_the_date_of_a_template_stays_that_of_the_first_start(dated, tmp_path, monkeypatch):
    class Later(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 5, 17)

    today = datetime.date.today().isoformat()
    outcome = run_ranks(run, 1, config=dated(1, "first"))[0]
    assert isinstance(outcome, dict) and outcome["step"] == 1, outcome
    # The next start is on another day, with an empty cache of tokenized data.
    monkeypatch.setattr(run_data.datetime, "date", Later)
    outcome = run_ranks(run, 2, config=dated(2, "second"))[0]
    assert isinstance(outcome, dict) and outcome["step"] == 2, outcome
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["data"]["template_date"] == today
    held_out = [pq.read_table(path)["id"].to_pylist() for path in sorted((tmp_path / "out" / "eval").glob("*.parquet"))]
    assert len(held_out) == 2 and held_out[0] == held_out[1]
    fresh = dated(1, "third")
    fresh = fresh.model_copy(update={"train": fresh.train.model_copy(update={"output_dir": str(tmp_path / "new")})})
    assert run_data.with_template_date(fresh).data.template_date == "2031-05-17"


def test_an_invalid_date_is_refused(dated):
    config = dated(1, "cache").model_dump(mode="json")
    config["data"]["template_date"] = "2026-13-01"
    with pytest.raises((ConfigError, ValueError), match="Value error, a date, YYYY-MM-DD, for example 2026-01-31"):
        type(dated(1, "cache"))(**config)
