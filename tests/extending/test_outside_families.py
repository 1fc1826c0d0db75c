"""Tests of model families from outside the tree: transformers' logits, bitwise export, steps, and their plugins."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_engine import ACTIVATIONS, FAMILIES, NORMS
from dpo_engine.config.run import import_plugins
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.memory import parameters
from support.family_cases import expected_logits
from support.layouts import assert_same_numbers, assert_same_weights
from support.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples" / "extend"
CASES = {
    "olmo": ("olmo", {}),
    "jais2": ("jais2", {"num_key_value_heads": 2}),
    "jais2, relu": ("jais2", {"hidden_act": "relu", "attention_bias": False}),
}
TOKENS = torch.randint(515, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def plugins(monkeypatch):
    """Import the examples as plugins, and forget them after the test."""
    registries = (FAMILIES, NORMS, ACTIVATIONS)
    before = [dict(registry) for registry in registries]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert import_plugins(["olmo", "jais2"]) == []
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in ("olmo", "jais2"):
        del sys.modules[name]


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2 vpp2", marks=pytest.mark.slow)])
def test_logits_match_transformers_and_export_is_bitwise(layout, plugins, tiny_hf, tmp_path):
    from model.test_family_logits import LAYOUTS, load_and_save
    from model.test_weights import assert_same_bits

    directories = {name: tiny_hf(family, pad_token_id=0, **options) for name, (family, options) in CASES.items()}
    world, dims = LAYOUTS[layout]
    found = run_ranks(load_and_save, world, directories=directories, layout=dims, exports=tmp_path)[-1]
    for name, directory in directories.items():
        assert not isinstance(found[name], str), found[name]
        theirs = expected_logits(directory, TOKENS)
        assert (found[name] - theirs).abs().max() <= 1e-12 * theirs.abs().max()
        assert_same_bits(tmp_path / name, directory)


@pytest.mark.parametrize(
    "name, layout", [("olmo", {"tp": 2}), pytest.param("jais2, relu", {"cp": 2}, marks=pytest.mark.slow)]
)
def test_trees_match_padded_rows_on_one_rank(name, layout, plugins, tiny_hf, tmp_path):
    from training.test_family_steps import TREE, train

    family, options = CASES[name]
    start = tiny_hf(family, pad_token_id=0, **options)
    (one,) = train(start, tmp_path / "one", 1, {})
    for result in train(start, tmp_path / "two", 2, layout, batch=TREE):
        assert_same_numbers(result, one, 1e-10)
    assert_same_weights(tmp_path / "two", tmp_path / "one", start, 1e-10)


def test_parameters_and_refusals(plugins, tiny_hf, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = tiny_hf("olmo", pad_token_id=0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert parameters(read_architecture(directory)) == sum(one.numel() for one in model.parameters())
    model.config.clip_qkv = 8.0
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="clip_qkv=8.0: the engine does not clip queries, keys and values"):
        read_architecture(tmp_path)
    model.config.clip_qkv, model.config.hidden_act = None, "relu"
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="hidden_act='relu': the MLP of this family uses SiLU"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("name", ["olmo", "jais2"])
def test_a_family_is_one_short_file_that_needs_no_megatron(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 45
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {name}; assert 'megatron' not in sys.modules"
    assert importlib.util.find_spec("megatron")
    subprocess.run([sys.executable, "-c", code], check=True)
