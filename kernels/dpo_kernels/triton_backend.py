"""The backend ``triton``: every operation, on a CUDA device or in Triton's interpreter."""

from dpo_kernels.triton_attention import tree_attention
from dpo_kernels.triton_logits import linear_grad, linear_keep, linear_kept_grad, linear_stats

__all__ = [
    "linear_grad",
    "linear_keep",
    "linear_kept_grad",
    "linear_stats",
    "tree_attention",
]
