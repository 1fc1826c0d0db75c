"""Matrix products that are accumulated in fp32 or wider, whatever the dtype of the operands."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over elements of ``dtype``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Compute ``left @ right`` in :func:`wide` of their dtype; on a GPU without converting the operands."""
    out = wide(left.dtype)
    if left.dtype == out:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out)
    return left.to(out) @ right.to(out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total += left @ right``; the product is summed in fp32, then added in the dtype of ``total``."""
    if total.is_cuda and total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # a separate addition, which lets a CPU use its fastest matrix product
        total.add_(wide_product(left, right))
