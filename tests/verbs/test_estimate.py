"""Tests of the estimates of parameters and memory, against real models and sums written out by hand."""

import pytest
from transformers import AutoModelForCausalLM

from dpo_engine.config.run import Config
from dpo_engine.model.architecture import read_architecture
from dpo_engine.platform.parallel import ParallelDims
from dpo_engine.verbs.estimate import layer_parameters, memory, parameters, stage_parameters

SMALLEST = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameters_match_the_model(tiny_hf, family, tied):
    directory = tiny_hf(family, tie_word_embeddings=tied)
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(directory).parameters())
    assert parameters(read_architecture(directory)) == expected


def test_stages_add_up_to_the_model_with_padding(tiny_hf):
    arch = read_architecture(tiny_hf("qwen2"))
    dims = ParallelDims(pp=4, world=4)
    rows = dims.padded_vocab(arch.vocab_size) - arch.vocab_size
    expected = parameters(arch) + 2 * rows * arch.hidden_size
    assert sum(stage_parameters(arch, dims, stage) for stage in range(4)) == expected


def test_tied_embeddings_are_held_by_both_end_stages(tiny_hf):
    arch = read_architecture(tiny_hf("llama", tie_word_embeddings=True))
    table = ParallelDims().padded_vocab(arch.vocab_size) * arch.hidden_size
    one = stage_parameters(arch, ParallelDims(), 0)
    two = ParallelDims(pp=2, world=2)
    assert stage_parameters(arch, two, 0) + stage_parameters(arch, two, 1) == one + table


def test_tensor_parallel_rank_holds_its_shard_and_all_norms(tiny_hf):
    arch = read_architecture(tiny_hf("qwen3"))  # hidden 64, 8 heads, 4 KV heads, feed-forward 96
    dim = arch.head_dim
    norms = 2 * 64 + 2 * dim
    assert layer_parameters(arch, 2) == (4 + 2 * 2) * dim * 64 + 4 * dim * 64 + 3 * 64 * 48 + norms
    assert layer_parameters(arch, 8) == (1 + 2 * 1) * dim * 64 + 1 * dim * 64 + 3 * 64 * 12 + norms


def test_memory_of_a_rank(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))
    dims = ParallelDims(pp=2, cp=2, world=8)
    count = max(stage_parameters(arch, dims, stage) for stage in range(2))
    cost = memory(Config.parse(SMALLEST), arch, dims, dtype="bf16")
    assert (cost.weights, cost.gradients, cost.optimizer, cost.reference) == (
        2 * count,
        4 * count,
        3 * count,  # 12 bytes per parameter, divided by dp 2 x cp 2
        2 * count,
    )
    assert cost.stage == 1  # the last stage, which also has the final norm
    assert cost.total == 11 * count
    expected = f"{count:,} parameters x (2 weight + 4 gradient + 12 optimizer / 4 (dp x cp) + 2 reference) bytes"
    assert cost.formula == expected


def test_memory_without_reference_or_distributed_optimizer(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))
    raw = {**SMALLEST, "parallel": {"distributed_optimizer": False}, "reference": {"mode": "none"}}
    cost = memory(Config.parse(raw), arch, ParallelDims(world=4), dtype="fp32")
    count = stage_parameters(arch, ParallelDims(), 0)
    assert (cost.weights, cost.gradients, cost.optimizer, cost.reference) == (4 * count, 4 * count, 8 * count, 0)
    assert cost.formula == f"{count:,} parameters x (4 weight + 4 gradient + 8 optimizer) bytes"
