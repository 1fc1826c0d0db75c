"""Tests of the choice of kernel backends for a run."""

from types import SimpleNamespace

import pytest
import torch

from dpo_engine.errors import ConfigError
from dpo_engine.model.kernels import choose_kernels, trees_are_slow
from dpo_kernels import backends_in_use, dispatch, eager, sdpa, varlen

GPU, CPU = SimpleNamespace(gpu=True), SimpleNamespace(gpu=False)
AUTO = {"attention": "auto", "head": "auto"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", {"eager": eager, "sdpa": sdpa, "varlen": varlen})
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_defaults", {"head": "eager", "attention": "sdpa", "layer": "eager"})
    monkeypatch.delenv("DPO_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "platform, dtype, head_dim, attention",
    [
        (GPU, torch.bfloat16, 128, "varlen"),
        (GPU, torch.bfloat16, 320, "sdpa"),
        (GPU, torch.float32, 128, "sdpa"),
        (CPU, torch.bfloat16, 128, "sdpa"),
    ],
)
def test_auto_takes_flash_attention_where_it_can_run(platform, dtype, head_dim, attention):
    choose_kernels(AUTO, SimpleNamespace(head_dim=head_dim), platform, dtype)
    assert backends_in_use() == f"eager (head, layer), {attention} (attention)"
    assert trees_are_slow(platform) == (platform.gpu and attention == "sdpa")


@pytest.mark.parametrize("able, attention", [(True, "triton"), (False, "varlen")])
def test_context_parallelism_takes_the_kernels_that_copy_no_keys(able, attention, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # otherwise, the backend triton is refused on a machine without a GPU
    monkeypatch.setattr("dpo_engine.model.kernels.triton_can_run", lambda: able)
    choose_kernels(AUTO, SimpleNamespace(head_dim=128), GPU, torch.bfloat16, cp=2)
    assert dispatch.backend_name("attention") == attention


@pytest.mark.parametrize(
    "platform, dtype, able, layer",
    [
        (GPU, torch.bfloat16, True, "triton"),
        (GPU, torch.bfloat16, False, "eager"),
        (GPU, torch.float64, True, "eager"),
        (CPU, torch.float32, True, "eager"),
    ],
)
def test_small_operations_are_fused_on_a_gpu(platform, dtype, able, layer, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # otherwise, the backend triton is refused on a machine without a GPU
    monkeypatch.setattr("dpo_engine.model.kernels.triton_can_run", lambda: able)
    choose_kernels(AUTO, SimpleNamespace(head_dim=128), platform, dtype)
    assert dispatch.backend_name("layer") == layer


def test_precedence(monkeypatch):
    """The order of precedence, highest first, is: configuration, plugin, environment variable, automatic choice."""
    arch = SimpleNamespace(head_dim=128)
    monkeypatch.setenv("DPO_KERNELS", "eager,sdpa")
    choose_kernels(AUTO, arch, GPU, torch.bfloat16)
    assert dispatch.backend_name("attention") == "sdpa"
    dispatch.use_backend("eager", "attention")  # as a plugin does when it is imported
    choose_kernels(AUTO, arch, GPU, torch.bfloat16)
    assert dispatch.backend_name("attention") == "eager"
    choose_kernels({**AUTO, "attention": "varlen"}, arch, GPU, torch.bfloat16)
    assert dispatch.backend_name("attention") == "varlen"


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"attention": "flash"}, "model.attention=flash: kernels='flash': unknown backend; use one of auto, eager, "),
        ({"head": "sdpa"}, "model.head=sdpa: kernel backend 'sdpa': does not implement head; it implements attention"),
        ({"head": "triton"}, "model.head=triton: kernels='triton': requires a CUDA device, but there is none"),
    ],
)
def test_unusable_backends_are_refused(asked, says):
    with pytest.raises(ConfigError) as refused:
        choose_kernels(AUTO | asked, SimpleNamespace(head_dim=128), CPU, torch.float32)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 128), (torch.bfloat16, 320)])
def test_flash_attention_is_refused_where_it_cannot_run(dtype, head_dim):
    asked = {**AUTO, "attention": "varlen"}
    choose_kernels(asked, SimpleNamespace(head_dim=head_dim), CPU, dtype)
    with pytest.raises(ConfigError, match="model.attention=varlen: flash attention needs model.dtype=bf16 and heads"):
        choose_kernels(asked, SimpleNamespace(head_dim=head_dim), GPU, dtype)


def test_backend_without_a_needed_option_is_refused(monkeypatch):
    class Older:
        @staticmethod
        def tree_attention(query, key, value, tree, scale=None):
            return eager.tree_attention(query, key, value, tree, scale)

    dispatch.register_backend("older", Older)
    asked, arch = {**AUTO, "attention": "older"}, SimpleNamespace(head_dim=128, model_type="mistral")
    choose_kernels(AUTO, arch, CPU, torch.float32, ["window"])
    choose_kernels(asked, arch, CPU, torch.float32)
    with pytest.raises(ConfigError) as refused:
        choose_kernels(asked, arch, CPU, torch.float32, ["window"])
    assert str(refused.value) == (
        "model.attention=older: the backend's tree_attention has no argument named window, which the layers of this "
        "mistral model need; use another backend"
    )


@pytest.mark.parametrize("able, attention", [(True, "triton"), (False, "sdpa")])
def test_soft_caps_do_not_run_on_flash_attention(able, attention, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("dpo_engine.model.kernels.triton_can_run", lambda: able)
    arch, needs = SimpleNamespace(head_dim=128, model_type="gemma2"), ["softcap"]
    choose_kernels(AUTO, arch, GPU, torch.bfloat16, needs)
    assert dispatch.backend_name("attention") == attention
    for asked, environment in (({"attention": "varlen"}, "auto"), ({}, "varlen")):
        monkeypatch.setattr(dispatch, "_chosen", {})
        monkeypatch.setenv("DPO_KERNELS", environment)
        with pytest.raises(ConfigError) as refused:
            choose_kernels(AUTO | asked, arch, CPU, torch.float32, needs)
        assert str(refused.value) == (
            "model.attention=varlen: flash attention does not support a soft cap on attention scores, but "
            "gemma2 models have one; set model.attention=auto"
        )


def test_default_must_implement_the_group():
    with pytest.raises(ValueError, match="kernel backend 'sdpa': does not implement head"):
        dispatch.set_default("sdpa", "head")
    with pytest.raises(ValueError, match="kernel backend 'auto': does not implement head"):
        dispatch.set_default("auto", "head")
