"""Tests of the choice of kernel backends: automatic choice, requested backends, and errors in place of fallbacks."""

from types import SimpleNamespace

import pytest
import torch

import dpo_kernels
from dpo_kernels import dispatch, eager, sdpa, varlen


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Start from the initial state of `dispatch`, without a GPU. Undo registrations and choices after the test."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "BACKENDS", {"eager": eager, "sdpa": sdpa, "varlen": varlen})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("DPO_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def with_triton(monkeypatch, installed: bool):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object() if installed else None)


def only(*operations, of=eager):
    return SimpleNamespace(**{name: getattr(of, name) for name in operations})


def test_auto_uses_measured_backends(monkeypatch):
    assert dispatch.backends_in_use() == "eager (head, layer), sdpa (attention)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.backends_in_use() == "eager (head, layer), sdpa (attention)"


def test_every_operation_is_in_a_group_and_dispatched():
    for group, operations in dispatch.GROUPS.items():
        for operation in operations:
            assert getattr(dpo_kernels, operation).__wrapped__ is getattr(eager, operation), group


def test_choice_covers_the_implemented_or_requested_operations():
    dispatch.use_backend("eager")
    assert dispatch.backends_in_use() == "eager (attention, head, layer)"
    dispatch.use_backend("sdpa")
    assert dispatch.backends_in_use() == "eager (head, layer), sdpa (attention)"
    dispatch.use_backend("eager", "attention")
    assert dispatch.backend("attention") is eager
    dispatch.use_backend("auto", "attention")
    assert dispatch.backend("attention") is sdpa
    dispatch.use_backend("eager")
    dispatch.use_backend("auto")
    assert dispatch.backend("attention") is sdpa


def test_environment_names_backends_and_use_backend_overrides_it(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS", "eager")
    assert dispatch.backend_name("attention") == "eager"
    monkeypatch.setenv("DPO_KERNELS", "eager, sdpa")
    assert dispatch.backends_in_use() == "eager (head, layer), sdpa (attention)"
    monkeypatch.setenv("DPO_KERNELS", "eager,auto")
    assert dispatch.backend_name("attention") == "sdpa"
    dispatch.use_backend("eager", "attention")
    assert dispatch.backend_name("attention") == "eager"


def test_plugin_backend_may_be_registered_after_the_environment_names_it(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS", "lab")
    with pytest.raises(
        ValueError, match="DPO_KERNELS='lab': unknown backend; use one of auto, eager, sdpa, triton, varlen"
    ):
        dispatch.backend_name("head")
    lab = only(*dispatch.GROUPS["head"])
    dispatch.register_backend("lab", lab)
    assert dispatch.backend("head") is lab
    assert dispatch.backends_in_use() == "lab (head), sdpa (attention), eager (layer)"


@pytest.mark.parametrize(
    "name, module, message",
    [
        ("lab", only("linear_stats", "linear_grad", "linear_keep"), "'lab': lacks linear_kept_grad of the group head"),
        (
            "lab",
            SimpleNamespace(),
            "'lab': implements no group of operations; the groups are attention, head,",
        ),
        ("sdpa", eager, "kernel backend 'sdpa': this name is taken"),
        ("triton", eager, "'triton': this name is taken"),
        ("auto", eager, "'auto': this name is taken"),
    ],
)
def test_invalid_registrations_are_refused(name, module, message):
    with pytest.raises(ValueError, match=message):
        dispatch.register_backend(name, module)


def test_unusable_backends_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="kernels='trition': unknown backend; use one of auto, eager, sdpa, triton, varlen"
    ):
        dispatch.use_backend("trition")
    with pytest.raises(ValueError, match="kernel backend 'sdpa': does not implement head; it implements attention"):
        dispatch.use_backend("sdpa", "head")
    with pytest.raises(ValueError, match="kernel backend 'auto': does not implement heads; it implements attention, "):
        dispatch.use_backend("auto", "heads")
    with_triton(monkeypatch, True)
    with pytest.raises(
        ValueError, match="kernels='triton': requires a CUDA device, but there is none; use eager, sdpa or"
    ):
        dispatch.use_backend("triton")
    with_triton(monkeypatch, False)
    with pytest.raises(ValueError, match="kernels='triton': the package triton is not installed; install it, or use"):
        dispatch.use_backend("triton")
    monkeypatch.setenv("DPO_KERNELS", "triton")
    with pytest.raises(ValueError, match="DPO_KERNELS='triton': the package triton is not installed"):
        dispatch.tree_attention(None, None, None, None)
    assert dispatch._chosen == {}
