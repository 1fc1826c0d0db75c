"""Operations on one rank's tensors. The package needs no process groups and nothing from the engine."""

from dpo_kernels.dispatch import (
    BACKENDS,
    GROUPS,
    backend,
    backend_name,
    backends_in_use,
    gated,
    linear_grad,
    linear_keep,
    linear_kept_grad,
    linear_stats,
    register_backend,
    rms_norm,
    rotate,
    set_default,
    split_heads,
    tree_attention,
    triton_can_run,
    use_backend,
)
from dpo_kernels.eager import KeptLogits, LinearStats
from dpo_kernels.eager_layer import HeadNorms
from dpo_kernels.tree import Tree

__all__ = [
    "BACKENDS",
    "GROUPS",
    "HeadNorms",
    "KeptLogits",
    "LinearStats",
    "Tree",
    "backend",
    "backend_name",
    "backends_in_use",
    "gated",
    "linear_grad",
    "linear_keep",
    "linear_kept_grad",
    "linear_stats",
    "register_backend",
    "rms_norm",
    "rotate",
    "set_default",
    "split_heads",
    "tree_attention",
    "triton_can_run",
    "use_backend",
]
