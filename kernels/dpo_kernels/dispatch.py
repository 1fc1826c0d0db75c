"""Which implementation of the operations runs: a named backend, chosen explicitly, never replaced silently."""

import os
from types import ModuleType
from typing import Any

from torch import Tensor

from dpo_kernels import eager

BACKENDS: dict[str, Any] = {"eager": eager}
OPERATIONS = ("shard_stats", "shard_grad", "shard_entropies")

_chosen = os.environ.get("DPO_KERNELS", "eager")


def register_backend(name: str, module: ModuleType | Any) -> None:
    """Add a backend: an object with a function for every name in ``OPERATIONS``, with eager's signatures.

    Raises ``ValueError`` when the name is taken or an operation is missing.
    """
    missing = [op for op in OPERATIONS if not callable(getattr(module, op, None))]
    if missing:
        raise ValueError(f"kernel backend {name!r}: lacks {', '.join(missing)}")
    if name in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is already registered")
    BACKENDS[name] = module


def use_backend(name: str) -> None:
    """Use backend ``name`` from now on. Raises ``ValueError`` for a name nobody registered."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; registered are {', '.join(sorted(BACKENDS))}")
    _chosen = name


def backend() -> Any:
    """The chosen backend. ``DPO_KERNELS`` names it at start; plugins may register theirs before the first use."""
    if _chosen not in BACKENDS:
        raise ValueError(f"DPO_KERNELS={_chosen!r}: unknown backend; registered are {', '.join(sorted(BACKENDS))}")
    return BACKENDS[_chosen]


def backend_name() -> str:
    """The name of the chosen backend."""
    return _chosen


def shard_stats(logits: Tensor, targets: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dpo_kernels.eager.shard_stats`."""
    return backend().shard_stats(logits, targets, start, valid)


def shard_grad(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, start: int, valid: int) -> Tensor:
    """See :func:`dpo_kernels.eager.shard_grad`."""
    return backend().shard_grad(logits, targets, lse, grad, start, valid)


def shard_entropies(logits: Tensor, lse: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """See :func:`dpo_kernels.eager.shard_entropies`."""
    return backend().shard_entropies(logits, lse, valid)
