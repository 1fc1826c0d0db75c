"""Tests of attention sinks in a whole model, whose family is defined here. The model also has sliding windows.

The expected logits come from transformers' Ministral with GPT-OSS's attention function, which has sinks.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_engine.model.architecture import FAMILIES
from dpo_engine.model.families.blocks import DENSE, SINKS
from dpo_engine.model.families.mistral import Mistral
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.families import TREE, train
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.wide import expected_logits

LAYOUTS = {"one": (1, {}), "tp2": (2, {"tp": 2}), "cp2": (2, {"cp": 2}), "tp4": (4, {"tp": 4})}
KINDS = ["sliding_attention", "full_attention"]
TOKENS = torch.randint(515, (2, 24), generator=torch.Generator().manual_seed(5))


class Family:
    rules = DENSE + SINKS

    @staticmethod
    def architecture(config):
        config.values["model_type"] = "ministral"
        return replace(Mistral.architecture(config), model_type="with_sinks", attention_sinks=True)


@pytest.fixture(scope="module", autouse=True)
def family():
    FAMILIES.register("with_sinks")(Family)
    yield
    FAMILIES.pop("with_sinks")


@pytest.fixture(scope="module")
def model(tiny_hf, tmp_path_factory):
    """Return the directories of a Ministral model and of the same model with sinks."""
    from transformers import AutoConfig

    count = AutoConfig.from_pretrained(tiny_hf("llama")).num_hidden_layers
    plain = tiny_hf("ministral", head_dim=16, sliding_window=8, layer_types=(KINDS * count)[:count], pad_token_id=0)
    directory = tmp_path_factory.mktemp("sinks")
    shutil.copytree(plain, directory, dirs_exist_ok=True)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "model_type": "with_sinks"}))
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(count):
        heads = values["num_attention_heads"]
        tensors[f"model.layers.{layer}.self_attn.sinks"] = torch.randn(heads, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return plain, directory


def with_sinks(directory):
    sinks = load_file(directory / "model.safetensors")

    def prepare(model):
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.sinks = sinks[f"model.layers.{number}.self_attn.sinks"].double()

    return prepare


def logits(directory, layout, export):
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf
    from dpo_engine.testing.sharded import open_model, whole_logits

    chunks, arch, groups = open_model(directory, layout, "fp64")
    load_hf(chunks, arch, directory, groups=groups)
    with torch.no_grad():
        found = whole_logits(chunks, TOKENS, groups)
    save_hf(chunks, arch, export, source=directory, groups=groups)
    return found[..., : arch.vocab_size]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "tp2" else pytest.mark.slow) for name in LAYOUTS]
)
def test_logits_match_transformers_and_export_is_bitwise(layout, model, tmp_path, monkeypatch):
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.ministral import modeling_ministral

    from dpo_engine.testing.comparison import assert_same_bits

    plain, directory = model
    ranks, dims = LAYOUTS[layout]
    got = run_ranks(logits, ranks, directory=directory, layout=dims, export=tmp_path / "export")[-1]
    without = expected_logits(plain, TOKENS)
    monkeypatch.setattr(modeling_ministral, "eager_attention_forward", modeling_gpt_oss.eager_attention_forward)
    expected = expected_logits(plain, TOKENS, with_sinks(directory))
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (got - without).abs().max() > 1e-2
    assert_same_bits(tmp_path / "export", directory)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_trees_match_padded_rows_on_one_rank(layout, model, tmp_path):
    (one,) = train(model[1], tmp_path / "one", [6, 5], {}, few=3)
    for result in train(model[1], tmp_path / "many", [6, 5], LAYOUTS[layout][1], few=3, batch=TREE):
        assert_same_numbers(result, one, 1e-10)
    assert_same_weights(tmp_path / "many", tmp_path / "one", model[1], 1e-10)
