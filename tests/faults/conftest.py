"""A small run of the command line that the fault cases harm: its files, its layouts, and what it left behind."""

from pathlib import Path

import pytest
from small_run import write_run
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
    """``run_yaml("name", parallel={"tp": 2})`` writes the file of such a run and returns its path.

    The run writes to the directory of that name beside it.
    """

    def make(name: str = "run", **sections) -> Path:
        return write_run(tmp_path, name, run_files, tiny_hf, sections)

    return make
