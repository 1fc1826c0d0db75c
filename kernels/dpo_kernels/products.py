"""Matrix products whose sums are kept in fp32, whatever the operands are."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over elements of ``dtype`` are kept in: fp32, or wider if they are."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in :func:`wide` of their dtype; on a GPU without copies of the operands."""
    out = wide(left.dtype)
    if left.dtype == out:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out)
    return left.to(out) @ right.to(out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; one product is summed in fp32, then added in the dtype of ``total``."""
    if total.is_cuda and total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # one more pass, by whatever a CPU's fastest product is
        total.add_(wide_product(left, right))
