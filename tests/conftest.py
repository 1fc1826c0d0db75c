"""Shared fixtures such as tiny random Hugging Face models; every test process uses one intra-op thread, as ranks do."""

import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from support.small_run import write_pairs, write_run
from support.tiny_tokenizers import piece_model

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; tests of the Hub use a local server
torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # shared machines can be slow, which must not fail a test
settings.load_profile("patient")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, here or by Megatron

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    """Return a function: ``tiny_hf("qwen3", tie_word_embeddings=True)`` makes a tiny random model in a directory.

    The same arguments give the same directory within a session. Weights are large, so that logits differ clearly.
    """
    made: dict[str, Path] = {}

    def make(
        family: str = "llama", *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config
    ) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        key = repr((family, str(dtype), max_shard_size, sorted(config.items(), key=str)))
        if key not in made:
            torch.manual_seed(zlib.crc32(key.encode()))  # not from a counter, which would depend on the order of tests
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **config}))
            for name, parameter in model.named_parameters():
                # the biases of all experts of a layer are a matrix of zeros
                is_matrix = parameter.dim() > 1 and not name.endswith("bias")
                parameter.data.mul_(3.0) if is_matrix else parameter.data.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # zeros would not change which experts are chosen
                    buffer.copy_(0.1 * torch.randn_like(buffer))
            directory = tmp_path_factory.mktemp(family)
            model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Run a local server that speaks the protocol of the Hugging Face Hub, and use it as the Hub."""
    from support.hub_server import forget, serve, use_hub

    with serve() as server:
        use_hub(monkeypatch, tmp_path, server.url)
        yield server
    forget()


@pytest.fixture
def stage(tmp_path):
    """Yield a copy of the launch scripts, with stand-ins for Slurm's commands."""
    from support.slurm_stand_ins import StandIns

    stage = StandIns(tmp_path)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write a data set of 22 training pairs and 7 held-out pairs, and a tokenizer."""
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

    The run writes to a directory of the same name next to this file.
    """

    def make(name: str = "run", **sections) -> Path:
        return write_run(tmp_path, name, run_files, tiny_hf, sections)

    return make
