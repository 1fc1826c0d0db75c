"""Matrix products that are accumulated in fp32 or wider, whatever the dtype of the operands."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which elements of ``dtype`` are summed: fp64 for fp64, otherwise fp32."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in the dtype that :func:`wide` gives. On a GPU, the operands are not converted."""
    out = wide(left.dtype)
    if left.dtype == out:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out)
    return left.to(out) @ right.to(out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, in the dtype of ``total``. The product itself is summed in fp32 or wider."""
    if total.is_cuda and total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # add separately, so that a CPU can use its fastest matrix product
        total.add_(wide_product(left, right))
