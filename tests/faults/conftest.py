"""A small run of the command line that the fault cases harm: its files, its layouts, and what it left behind."""

from pathlib import Path

import pytest
import yaml
from test_trainer import write_pairs
from tiny_tokenizers import piece_model


@pytest.fixture(scope="session")
def run_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run-files")
    return {
        "train": write_pairs(folder / "train.jsonl", 24),
        "validation": write_pairs(folder / "held.jsonl", 4, start=100),
        "tokenizer": str(piece_model(folder / "tok.model")),
    }


@pytest.fixture
def run_yaml(run_files, tiny_hf, tmp_path):
    """``run_yaml("name", parallel={"tp": 2})`` writes the file of a run of 12 steps that saves at every fourth.

    Returns its path; the run writes to the directory of that name beside it.
    """

    def make(name: str = "run", **sections) -> Path:
        raw = {
            "model": {"path": str(tiny_hf("llama", num_hidden_layers=2)), "tokenizer": run_files["tokenizer"]},
            "data": {"train": run_files["train"], "validation": run_files["validation"], "max_length": 64},
            "batch": {"layout": "stacked"},
            "optim": {"lr": 1e-3, "warmup_steps": 1},
            "train": {
                "output_dir": str(tmp_path / name),
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "epochs": 2,
            },
            "checkpoint": {"save_interval": 4, "export": False},
            "logging": {"progress": "off"},
        }
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return make
