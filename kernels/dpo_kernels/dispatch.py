"""Choose the backend that runs each operation. The choice can be set and reported; there are no silent fallbacks."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

from dpo_kernels import eager, sdpa, varlen

GROUPS: dict[str, tuple[str, ...]] = {
    "head": ("linear_stats", "linear_grad", "linear_keep", "linear_kept_grad"),
    "attention": ("tree_attention",),
    "layer": ("split_heads", "rotate", "gated", "rms_norm"),
}
"""The groups of operations. A backend must implement all operations of a group, or none of them."""

BACKENDS: dict[str, Any] = {"eager": eager, "sdpa": sdpa, "varlen": varlen}
"""Backends by name. ``triton`` is added when it is first requested, because not every machine can import it."""

_defaults = {"head": "eager", "attention": "sdpa", "layer": "eager"}  # what ``auto`` means
_chosen: dict[str, str] = {}  # group to backend, as set by use_backend; DPO_KERNELS decides for the other groups

P = ParamSpec("P")
R = TypeVar("R")


def register_backend(name: str, module: ModuleType | Any) -> None:
    """Register a backend: an object that has all functions of one or more ``GROUPS``, like ``eager``.

    Raises ``ValueError`` if the name is taken, if a group is incomplete, or if no group is implemented.
    """
    if name in (*BACKENDS, "auto", "triton"):
        raise ValueError(f"kernel backend {name!r}: this name is taken; choose another name")
    for group, operations in GROUPS.items():
        missing = [operation for operation in operations if not callable(getattr(module, operation, None))]
        if missing and len(missing) < len(operations):
            raise ValueError(
                f"kernel backend {name!r}: lacks {', '.join(missing)} of the group {group}; implement the whole group"
            )
    if not _groups(module):
        raise ValueError(f"kernel backend {name!r}: implements no group of operations; the groups are {_names(GROUPS)}")
    BACKENDS[name] = module


def use_backend(name: str, *groups: str) -> None:
    """Use backend ``name`` for the given groups from now on. Without groups, use it for all groups that it implements.

    ``auto`` means the default; see :func:`set_default`.

    Raises ``ValueError`` if the backend is not registered, lacks one of the groups, or cannot run on this machine.
    """
    able = _implemented(name, "kernels")
    if lacking := [group for group in groups if group not in able]:
        raise ValueError(f"kernel backend {name!r}: does not implement {_names(lacking)}; it implements {_names(able)}")
    for group in groups or able:
        _chosen[group] = name


def set_default(name: str, group: str) -> None:
    """Set the backend that ``auto`` means for a group.

    Initially, ``auto`` means ``sdpa`` for attention and ``eager`` for the other groups.

    Raises ``ValueError`` like :func:`use_backend`.
    """
    if name == "auto" or group not in _implemented(name, "kernels"):
        raise ValueError(f"kernel backend {name!r}: does not implement {group}; choose a backend that does")
    _defaults[group] = name


def backend_name(group: str) -> str:
    """Return the name of the backend that runs a group of operations.

    A choice made with :func:`use_backend` takes precedence over the environment variable ``DPO_KERNELS``, which is a
    comma-separated list of names. Of the names whose backend implements the group, the last one is used. If
    :func:`use_backend` has not chosen a backend for the group, the variable is read at every call, because plugins can
    register backends at any time.

    Raises ``ValueError`` like :func:`use_backend`.
    """
    name = _chosen.get(group) or _by_environment(group)
    return _defaults[group] if name == "auto" else name


def backend(group: str) -> Any:
    """Return the backend that runs a group of operations. Raises like :func:`backend_name`."""
    return _loaded(backend_name(group), "kernels")


def backends_in_use() -> str:
    """Return the backends in use, for the log: ``eager (head, layer), sdpa (attention)``.

    Raises ``ValueError`` like :func:`use_backend`.
    """
    groups: dict[str, list[str]] = {}
    for group in GROUPS:
        groups.setdefault(backend_name(group), []).append(group)
    return ", ".join(f"{name} ({_names(of)})" for name, of in groups.items())


def _by_environment(group: str) -> str:
    name = "auto"
    for candidate in os.environ.get("DPO_KERNELS", "auto").split(","):
        if group in _implemented(candidate.strip(), "DPO_KERNELS"):
            name = candidate.strip()
    return name


def _implemented(name: str, asked_by: str) -> list[str]:
    return list(GROUPS) if name == "auto" else _groups(_loaded(name, asked_by))


def _groups(module: Any) -> list[str]:
    return [group for group, operations in GROUPS.items() if all(hasattr(module, name) for name in operations)]


def _loaded(name: str, asked_by: str) -> Any:
    if name == "triton" and name not in BACKENDS:
        BACKENDS[name] = _triton(asked_by)
    if name not in BACKENDS:
        known = _names({*BACKENDS, "auto", "triton"})
        raise ValueError(f"{asked_by}={name!r}: unknown backend; use one of {known}")
    return BACKENDS[name]


def triton_can_run() -> bool:
    """Whether triton is installed and this process can run its kernels: on a GPU, or in Triton's interpreter."""
    able = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return able and importlib.util.find_spec("triton") is not None


def _triton(asked_by: str) -> ModuleType:
    if not importlib.util.find_spec("triton"):
        raise ValueError(f"{asked_by}='triton': the package triton is not installed; install it, or use eager or sdpa")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{asked_by}='triton': requires a CUDA device, but there is none; use eager, sdpa or auto")
    return importlib.import_module("dpo_kernels.triton_backend")


def _names(names: Any) -> str:
    return ", ".join(sorted(names))


def _dispatched(group: str, definition: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(definition)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        return getattr(backend(group), definition.__name__)(*args, **kwargs)

    return operation


linear_stats = _dispatched("head", eager.linear_stats)
linear_grad = _dispatched("head", eager.linear_grad)
linear_keep = _dispatched("head", eager.linear_keep)
linear_kept_grad = _dispatched("head", eager.linear_kept_grad)
tree_attention = _dispatched("attention", eager.tree_attention)
split_heads = _dispatched("layer", eager.split_heads)
rotate = _dispatched("layer", eager.rotate)
gated = _dispatched("layer", eager.gated)
rms_norm = _dispatched("layer", eager.rms_norm)
