"""Shared fixtures: tiny random Hugging Face models made in memory, and one intra-op thread as the ranks have."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # machines are shared, and a slow example is no wrong one
settings.load_profile("patient")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, here or by Megatron

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
    """``tiny_hf("qwen3", tie_word_embeddings=True)`` gives the directory of a tiny random model of that family.

    The same arguments give the same directory within a session. Weights are scaled up so that logits differ clearly.
    """
    made: dict[str, Path] = {}

    def make(
        family: str = "llama", *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config
    ) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        key = repr((family, str(dtype), max_shard_size, sorted(config.items(), key=str)))
        if key not in made:
            torch.manual_seed(len(made) + 1)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **config}))
            for parameter in model.parameters():
                parameter.data.mul_(3.0) if parameter.dim() > 1 else parameter.data.add_(
                    0.1 * torch.randn_like(parameter)
                )
            directory = tmp_path_factory.mktemp(family)
            model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
            made[key] = directory
        return made[key]

    return make
