"""Tests of training the text part of a model that also reads images, and of models whose adapters are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dpo_engine.config.adapter_section import AdapterConfig
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.export import Export
from dpo_engine.model.weights.peft import adapter_problems
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs.check import check
from support.family_cases import checkpoint
from support.small_run import config_of, run

OTHERS = ("vision_tower.", "multi_modal_projector.")


@pytest.fixture(scope="module")
def model(tiny_hf):
    directory = checkpoint(tiny_hf, "gemma3")
    (directory / "preprocessor_config.json").write_text("{}")
    return directory


def test_adapters_are_refused(model):
    assert adapter_problems(AdapterConfig(), read_architecture(model)) == [
        "adapter: adapters of gemma3 models are not supported, because PEFT and the engine use different names for "
        "the layers of these models; remove the section"
    ]


def test_adapters_of_transposed_weights_are_refused(tiny_hf):
    assert adapter_problems(AdapterConfig(), read_architecture(checkpoint(tiny_hf, "gpt2"))) == [
        "adapter: adapters of gpt2 models are not supported, because the weights of these models are stored "
        "transposed; remove the section"
    ]


@pytest.mark.slow
def test_run_exports_the_whole_model(model, files, tmp_path):
    from transformers import Gemma3ForConditionalGeneration

    sections = {"parallel": {"tp": 2}, "train": {"epochs": 1}}
    config = config_of(files, model, tmp_path / "run", **sections)
    assert check(config) == []
    run_ranks(run, 2, config=config)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith(OTHERS), name
    assert json.loads((tmp_path / "run" / "hf" / "preprocessor_config.json").read_text()) == {}
    assert Export(tmp_path / "run" / "hf").refusal(model) is None, "a later export must be able to replace this one"
    reread = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "run" / "hf")
    assert reread.config.vision_config.image_size == 28
