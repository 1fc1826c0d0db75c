"""Tests of choosing the layer spec, and of the reasons why Transformer Engine's layers are refused."""

from types import SimpleNamespace

import pytest
import torch

from dpo_engine.errors import ConfigError
from dpo_engine.model import spec
from dpo_engine.model.architecture import read_architecture
from dpo_engine.platform.device import Platform
from support.family_cases import checkpoint

LLAMA = SimpleNamespace(model_type="llama", suits_transformer_engine=True, experts=None)
CASES = [  # gpu, installed, dtype, and the reason why Transformer Engine cannot be used (None if it can be used)
    (False, True, torch.float32, "this machine has no GPU"),
    (True, False, torch.bfloat16, "Transformer Engine is not installed"),
    (True, True, torch.float64, "Transformer Engine does not support fp64"),
    (True, True, torch.bfloat16, None),
]


@pytest.mark.parametrize("gpu, installed, dtype, lack", CASES)
def test_transformer_engine_is_used_only_if_it_can_run(gpu, installed, dtype, lack, monkeypatch):
    monkeypatch.setattr(spec, "has_transformer_engine", lambda: installed)
    platform = Platform(torch.device("cpu"), "gloo", gpu=gpu)
    assert spec.choose_spec("native", LLAMA, platform, dtype) == "native"
    assert spec.choose_spec("auto", LLAMA, platform, dtype) == ("native" if lack else "te")
    if lack is None:
        assert spec.choose_spec("te", LLAMA, platform, dtype) == "te"
    else:
        with pytest.raises(ConfigError, match=f"model.spec='te': {lack}; set 'native' or 'auto'"):
            spec.choose_spec("te", LLAMA, platform, dtype)


@pytest.mark.parametrize(
    "case, lack",
    [
        ("olmo2", "layers do not support olmo2 models"),
        ("gpt_oss", "experts have neither the biases nor the activation of gpt_oss models"),
    ],
)
def test_transformer_engine_is_not_used_for_layers_that_it_does_not_support(case, lack, tiny_hf, monkeypatch):
    monkeypatch.setattr(spec, "has_transformer_engine", lambda: True)
    given = read_architecture(checkpoint(tiny_hf, case)), Platform("cuda", "nccl", gpu=True)
    assert spec.choose_spec("auto", *given, torch.bfloat16) == "native"
    with pytest.raises(ConfigError, match=f"model.spec='te': Transformer Engine's {lack}; set"):
        spec.choose_spec("te", *given, torch.bfloat16)


def test_transformer_engine_is_not_used_if_some_experts_are_frozen(tiny_hf, monkeypatch):
    """One module of Transformer Engine holds one kind of matrix for all experts that a rank has in a layer.

    For example, a module holds the ``down_proj`` matrices. If the first expert's matrix is frozen, the module computes
    no weight gradients. Otherwise, the module computes the weight gradients of all its experts.
    """
    monkeypatch.setattr(spec, "has_transformer_engine", lambda: True)
    given = read_architecture(checkpoint(tiny_hf, "qwen3_moe")), Platform("cuda", "nccl", gpu=True), torch.bfloat16
    matrices, down = r"model\.layers\.1\.mlp\.experts\.{}\..*", r".*\.experts\.\d\.down_proj\.weight"
    for frozen in ([matrices.format(r"\d")], [down], [".*self_attn.*"], [".*mlp.gate.*"]):
        assert spec.choose_spec("te", *given, frozen) == "te"
    for frozen in ([matrices.format(0)], [down.replace(r"\d", "[1-7]", 1)]):
        assert spec.choose_spec("native", *given, frozen) == spec.choose_spec("auto", *given, frozen) == "native"
        with pytest.raises(ConfigError, match="but optim.freeze freezes only some of them; set 'native' or 'auto'"):
            spec.choose_spec("te", *given, frozen)
