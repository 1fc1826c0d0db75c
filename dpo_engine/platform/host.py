"""Patches that let Megatron-Core run on a machine without a GPU.

Megatron-Core refers to CUDA in a few dozen places, even where it computes nothing on a GPU. Each row of
:func:`replacements` has one name to patch, its replacement, and the reason. :mod:`dpo_engine.platform.device` calls
:func:`install` if there is no GPU. Importing this file changes nothing. The only other code that patches torch for a
run is :mod:`dpo_engine.platform.torchrun`, which changes how torchrun handles signals.
"""

import contextlib
import functools
import importlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from dpo_engine.platform.host_operations import (
    WeightGradients,
    counts_on_host,
    gather_rows,
    mkl_is_slow,
    product,
)

CPU = torch.device("cpu")
KERNELS = torch.library.Library("aten", "IMPL", "CPU")
"""The CPU kernels that :func:`install` registers for torch operators. They stay registered while this object exists."""

GATHER = "megatron.core.tensor_parallel.mappings._gather_along_first_dim"
GROUP = "megatron.core.parallel_state.create_group"
FACTORIES = "empty zeros ones full tensor as_tensor arange rand randn randint empty_like zeros_like ones_like full_like"


class Replacement(NamedTuple):
    """One patch: the object at the dotted name ``target`` is replaced by ``value``, for the given ``reason``.

    missing_ok  whether the name may be missing in the installed version
    """

    target: str
    value: Any
    reason: str
    missing_ok: bool = False


def host_device(device: Any) -> Any:
    """Return the CPU if ``device`` is a CUDA device (a name, index or ``torch.device``), else ``device`` unchanged."""
    if isinstance(device, int) or str(device).startswith("cuda"):
        return CPU
    return device


def on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a version of ``factory`` that creates every GPU tensor on the CPU instead, and rejects pinned memory."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = host_device(kwargs["device"])
        if kwargs.get("pin_memory"):
            raise RuntimeError("pinned memory is not available on a machine without a GPU")
        return factory(*args, **kwargs)

    return create


class Stream:
    """A replacement for CUDA streams and events; on the CPU, everything runs in program order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """Do nothing, because the CPU executes in program order."""

    wait_event = record = wait = synchronize = lambda self, *args, **kwargs: None

    def record_event(self, event: Any = None) -> "Stream":
        """Return an event that has already happened."""
        return self


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
    """Return a new function that calls ``value``, because torch's compiler rejects a function that has two names."""
    return lambda *args, **kwargs: value(*args, **kwargs)


def one_for_equal_ranks(create_group: Callable[..., Any]) -> Callable[..., Any]:
    """Return a version of ``create_group`` that creates one process group for each set of ranks.

    All ranks must create their common groups in the same order, which ``create_group`` itself also requires.
    """
    groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()

    @functools.wraps(create_group)
    def create(ranks: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        existing = groups.setdefault(dist.group.WORLD, {})
        if tuple(ranks) not in existing:
            existing[tuple(ranks)] = create_group(ranks, *args, **kwargs)
        return existing[tuple(ranks)]

    return create


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


def _current(target: str) -> Any:
    """Return the object that the dotted name ``target`` refers to, so that a replacement can wrap it."""
    owner, name = resolve(target)
    return getattr(owner, name)


def replacements() -> list[Replacement]:
    """Return all patches. The list is built on each call, because the values wrap the current objects."""
    literal = "Megatron passes device='cuda' (schedules, gradient clipping, optimizer scalars)"
    order = "the CPU executes in program order, so streams and synchronization need not do anything"
    rng = "Megatron's RNG tracker saves and restores the states of CUDA generators"
    return [
        *(Replacement(f"torch.{name}", on_host(getattr(torch, name)), literal) for name in FACTORIES.split()),
        Replacement("torch.Tensor.to", _to(torch.Tensor.to), literal),
        Replacement("torch.Tensor.cuda", answers(_same), literal),
        Replacement("torch.nn.Module.cuda", answers(_same), literal),
        Replacement(
            "torch.Tensor.type", _type(torch.Tensor.type), "the optimizers expect names like torch.cuda.FloatTensor"
        ),
        Replacement("torch.cuda.current_device", lambda: CPU, "Megatron creates its buffers on the current device"),
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
            "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
            WeightGradients,
            "Apex's version needs a GPU; without this function, each weight gradient needs a temporary buffer",
            missing_ok=True,
        ),
        Replacement(
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
            True,
            "Megatron's linear layers check this flag before they call fused_weight_gradient_mlp_cuda",
        ),
        Replacement(
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
            counts_on_host,
            "all_to_all_single rejects token counts that are tensors, but Megatron converts such counts only if they "
            "are on a GPU",
        ),
        Replacement(
            GROUP,
            one_for_equal_ranks(_current(GROUP)),
            "Megatron creates about 20 groups, many with the same ranks; for each group, gloo opens connections and "
            "starts a thread that wakes up 100 times per second",
        ),
        Replacement(
            GATHER,
            gather_rows(_current(GATHER)),
            "gloo gathers only parts of equal size, but ranks that share an expert have different numbers of tokens",
        ),
        Replacement(
            "megatron.core.transformer.moe.moe_utils.te_general_gemm",
            None,
            "Megatron-Core 0.16.1 reads this name, but defines it only if Transformer Engine can be imported",
            missing_ok=True,
        ),
    ]


def install() -> None:
    """Apply all patches; a second call does nothing.

    Raises ``AttributeError`` if the installed Megatron-Core or torch lacks a name that must exist.
    """
    if getattr(torch.cuda.current_device, "__module__", "") == __name__:
        return
    # `with torch.device(...)` has a cached list of the functions that create tensors, and recognizes them by identity.
    # Build that list before the functions are replaced.
    _device_constructors()
    for row in replacements():
        owner, name = resolve(row.target)
        if not row.missing_ok and not hasattr(owner, name):
            raise AttributeError(f"{row.target}: missing in the installed version; patched because: {row.reason}")
        setattr(owner, name, row.value)
    if mkl_is_slow():
        multiply_by_onednn()


def multiply_by_onednn() -> None:
    """Make torch use oneDNN for matrix products in this process. Call this before anything else uses oneDNN."""
    # With `batch.layout=tree`, rows have many different lengths. oneDNN would cache about a thousand primitives, which
    # would take half a gigabyte.
    for name, programs in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0"), ("LRU_CACHE_CAPACITY", "4")):
        os.environ.setdefault(name, programs)
    KERNELS.impl("mm", product)


def resolve(target: str) -> tuple[Any, str]:
    """Split a dotted name into the object that owns it and its last part.

    For example, ``torch.Tensor.to`` gives ``(torch.Tensor, "to")``. Raises ``AttributeError`` if the owner does not
    exist.
    """
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
