"""Patches that let Megatron-Core run on a machine without a GPU.

Megatron-Core refers to CUDA in a few dozen places, even where it computes nothing there. Each row of
:func:`replacements` gives one name to patch, its replacement, and the reason. :mod:`dpo_engine.platform.device` calls
:func:`install` if there is no GPU; importing this file changes nothing. No other file patches anything.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._device import _device_constructors

from dpo_engine.platform.host_operations import (
    WeightGradients,
    mkl_is_slow,
    product,
    rotate,
    swiglu,
)

CPU = torch.device("cpu")
KERNELS = torch.library.Library("aten", "IMPL", "CPU")
"""The torch operator kernels that :func:`install` replaces; they stay replaced while this object exists."""

FACTORIES = "empty zeros ones full tensor as_tensor arange rand randn randint empty_like zeros_like ones_like full_like"


class Replacement(NamedTuple):
    """One patch: the dotted ``target``, the replacement ``value``, and the reason."""

    target: str
    value: Any
    reason: str
    missing_ok: bool = False


def host_device(device: Any) -> Any:
    """Return the CPU for any form of a CUDA device (name, index, ``torch.device``), else ``device`` itself."""
    if isinstance(device, int) or str(device).startswith("cuda"):
        return CPU
    return device


def on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``factory`` so that its ``device`` argument passes through :func:`host_device`."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = host_device(kwargs["device"])
        if kwargs.get("pin_memory"):
            raise RuntimeError("pinned memory is not available on a machine without a GPU")
        return factory(*args, **kwargs)

    return create


class Stream:
    """A stand-in for CUDA streams and events on the host, where everything runs in program order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """Do nothing: the host executes in program order."""

    wait_event = record = record_event = wait = synchronize = lambda self, *args, **kwargs: None


def _to(tensor_to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (int, str, torch.device)):
            args = (host_device(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = host_device(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    return to


def _type(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(tensor_type)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    return type_name


def answers(value: Callable[..., Any]) -> Callable[..., Any]:
    """Return a new function that calls ``value``; torch's compiler refuses one function under two names."""
    return lambda *args, **kwargs: value(*args, **kwargs)


def _same(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _stream(*args: Any, **kwargs: Any) -> Stream:
    return Stream()


def _null_context(*args: Any, **kwargs: Any) -> Any:
    return contextlib.nullcontext()


def _rng_get(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _rng_set(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def replacements() -> list[Replacement]:
    """Return all patches; built on each call, because the values wrap the current objects."""
    literal = "Megatron writes device='cuda' (schedules, gradient clipping, optimizer scalars)"
    order = "the host executes in program order, so streams and synchronization are no-ops"
    rng = "Megatron's RNG tracker keeps CUDA generator states"
    return [
        *(Replacement(f"torch.{name}", on_host(getattr(torch, name)), literal) for name in FACTORIES.split()),
        Replacement("torch.Tensor.to", _to(torch.Tensor.to), literal),
        Replacement("torch.Tensor.cuda", answers(_same), literal),
        Replacement("torch.nn.Module.cuda", answers(_same), literal),
        Replacement(
            "torch.Tensor.type", _type(torch.Tensor.type), "the optimizers compare names: torch.cuda.FloatTensor"
        ),
        Replacement("torch.cuda.current_device", lambda: CPU, "Megatron reads it wherever it creates a buffer"),
        Replacement("torch.cuda.set_device", answers(_nothing), order),
        Replacement("torch.cuda.synchronize", answers(_nothing), order),
        Replacement("torch.cuda.empty_cache", answers(_nothing), order),
        Replacement("torch.cuda.Stream", Stream, order),
        Replacement("torch.cuda.Event", Stream, order),
        Replacement("torch.cuda.current_stream", answers(_stream), order),
        Replacement("torch.cuda.default_stream", answers(_stream), order),
        Replacement("torch.cuda.stream", answers(_null_context), order),
        Replacement("torch.cuda.get_rng_state", answers(_rng_get), rng),
        Replacement("torch.cuda.set_rng_state", answers(_rng_set), rng),
        Replacement("torch.cuda.manual_seed", answers(torch.manual_seed), rng),
        Replacement("megatron.core.tensor_parallel.random._get_cuda_rng_state", answers(_rng_get), rng),
        Replacement("megatron.core.tensor_parallel.random._set_cuda_rng_state", answers(_rng_set), rng),
        Replacement(
            "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb",
            rotate,
            "Transformer Engine's is for GPUs; Megatron's own takes seven passes forward and many more backward",
        ),
        Replacement(
            "megatron.core.transformer.mlp.bias_swiglu_impl",
            swiglu,
            "Megatron's is compiled for GPUs; its unfused form keeps three buffers and concatenates two gradients",
        ),
        Replacement(
            "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
            WeightGradients,
            "Apex's is for GPUs; without it each weight gradient needs a temporary buffer",
            missing_ok=True,
        ),
        Replacement(
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
            True,
            "Megatron's linears check it",
        ),
        Replacement(
            "megatron.core.transformer.moe.moe_utils.te_general_gemm",
            None,
            "Megatron-Core 0.16.1 defines the name only if Transformer Engine can be imported",
            missing_ok=True,
        ),
    ]


def install() -> None:
    """Apply all patches; a second call does nothing.

    Raises ``AttributeError`` with the target's name if the installed Megatron-Core or torch does not have it.
    """
    if getattr(torch.cuda.current_device, "__module__", "") == __name__:
        return
    # `with torch.device(...)` recognizes factories by identity, from a cached list. Build that list before patching.
    _device_constructors()
    for row in replacements():
        owner, name = resolve(row.target)
        if not row.missing_ok and not hasattr(owner, name):
            raise AttributeError(f"{row.target}: not in the installed version, but it is patched because: {row.reason}")
        setattr(owner, name, row.value)
    if mkl_is_slow():
        multiply_by_onednn()


def multiply_by_onednn() -> None:
    """Run torch's matrix products on oneDNN in this process; call it before anything else uses oneDNN."""
    # Tree rows vary in length, so oneDNN would cache about a thousand primitives for them: half a gigabyte.
    for name, programs in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0"), ("LRU_CACHE_CAPACITY", "4")):
        os.environ.setdefault(name, programs)
    KERNELS.impl("mm", product)


def resolve(target: str) -> tuple[Any, str]:
    """Split a dotted ``target`` into its owner and last name: ``torch.Tensor.to`` gives ``(torch.Tensor, "to")``."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise AttributeError(f"{target}: no such module")
