"""The backend ``triton``: every operation, on a CUDA device or in Triton's interpreter."""

from dpo_kernels.triton_attention import tree_attention
from dpo_kernels.triton_layer import gated, rotate, split_heads
from dpo_kernels.triton_logits import linear_grad, linear_keep, linear_kept_grad, linear_stats
from dpo_kernels.triton_norm import rms_norm

__all__ = [
    "gated",
    "linear_grad",
    "linear_keep",
    "linear_kept_grad",
    "linear_stats",
    "rms_norm",
    "rotate",
    "split_heads",
    "tree_attention",
]
