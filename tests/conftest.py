"""Shared fixtures, such as tiny random Hugging Face models.

Every test process uses one intra-op thread, like the ranks that tests start.
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dpo_engine.testing import TinyModels
from support.family_cases import CASES
from support.small_run import write_pairs, write_run
from support.tiny_tokenizers import piece_model

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; tests of the Hub use a local server
torch.set_num_threads(1)
gc.disable()  # until pytest has found all tests, because each garbage collection would scan all imported objects
settings.register_profile("patient", deadline=None)  # a slow machine must not make a test fail
settings.load_profile("patient")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels or Megatron import Triton


def pytest_collection_modifyitems(items):
    """Put the tests with the marker ``long`` first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """Exempt the existing objects from garbage collection, and enable the collection of all later objects."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Return an object that makes and caches tiny models. Its table of cases covers all supported model families."""
    return TinyModels(tmp_path_factory.mktemp("models"), CASES)


@pytest.fixture(scope="session")
def tiny_hf(tiny_models):
    """Return a function: ``tiny_hf("qwen3", tie_word_embeddings=True)`` saves a tiny random model.

    The function returns the model's directory. Within a session, calls with equal arguments return the same directory.
    The matrices have large values, so that a mistake clearly changes the logits.
    """
    return tiny_models.make


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Run a local server that implements the protocol of the Hugging Face Hub, and use this server as the Hub."""
    from support.hub_server import forget, serve, use_hub

    with serve() as server:
        use_hub(monkeypatch, tmp_path, server.url)
        yield server
    forget()


@pytest.fixture
def stage(tmp_path):
    """Yield a copy of the launch scripts, and stand-ins for the commands that the scripts run."""
    from support.slurm_stand_ins import StandIns

    stage = StandIns(tmp_path)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write a data set of 22 training pairs and 7 held-out pairs, and a tokenizer. Return the paths by name."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "train": write_pairs(folder / "train.jsonl", 22),
        "validation": write_pairs(folder / "held.jsonl", 7, start=100),
        "tokenizer": str(piece_model(folder / "tok.model")),
    }


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
    """Return a function: ``run_yaml("name", parallel={"tp": 2})`` writes a run's YAML file and returns its path.

    The run's output directory is next to this file, and has the file's name without ``.yaml``.
    """

    def make(name: str = "run", **sections) -> Path:
        return write_run(tmp_path, name, run_files, tiny_hf, sections)

    return make
