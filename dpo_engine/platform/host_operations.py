"""CPU versions of torch's `mm`, and of Megatron's operations that use a fused kernel, a copy from the GPU, or NCCL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL_PRODUCT = 1 << 20
"""Matrix products with fewer multiplications than this use torch's default, because oneDNN would be slower for them."""


class WeightGradients:
    """A replacement for Apex's extension ``fused_weight_gradient_mlp_cuda``, with the same interface."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """Add ``grad.T @ inputs`` to ``main_grad``.

        inputs  [n, i]        grad  [n, o]        main_grad  [o, i] fp32
        """
        main_grad.add_(grad.T @ inputs)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
    """The same operation under Apex's name for a 16-bit ``main_grad``."""


def mkl_is_slow() -> bool:
    """Whether MKL, which torch uses for matrix products by default, is slow on this processor, and oneDNN is available.

    MKL is Intel's library. On processors of other vendors, MKL uses only 256-bit kernels. oneDNN uses the widest
    vectors that the processor supports.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def product(left: Tensor, right: Tensor) -> Tensor:
    """Compute a matrix product with oneDNN; this function replaces torch's ``aten::mm``.

    Small products, dtypes other than fp32, and unusual memory layouts still use torch's default.

    left     [m, k]
    right    [k, n]
    Returns  [m, n]
    """
    (m, k), (_, n) = left.shape, right.shape
    strided = min(left.stride()) == 1 and max(left.stride()) >= min(left.shape)
    # If there are gaps between the rows of ``right``, oneDNN uses its reference kernel, which is 100 times slower.
    plain = k == right.shape[0] and strided and (right.is_contiguous() or right.T.is_contiguous())
    if left.dtype is right.dtype is torch.float32 and m * k * n >= SMALL_PRODUCT and plain:
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.ops.aten.mm.out(left, right, out=left.new_empty(m, n))


def counts_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert a tensor in host memory to a NumPy array if ``as_numpy`` is set. Otherwise, return the tensor unchanged.

    This function replaces Megatron's ``maybe_move_tensor_to_cpu``, which converts only tensors on a GPU.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def gather_rows(gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a version of ``gather`` that accepts parts of different sizes.

    ``gather`` is Megatron's all-gather along the first axis, which gloo supports only for parts of equal size. The
    returned function pads the parts to the largest size, gathers them, and removes the padding from the result.

    *Collectives* of the returned function: the all-gather of ``gather``, with each part padded to the largest size.
    """

    def gather_any(part: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        sizes = None if output_split_sizes is None else [int(size) for size in output_split_sizes]
        if sizes is None or group.size() == 1 or max(sizes) == 0:
            return gather(part, group, None, use_global_buffer)
        rows = part.new_zeros((max(sizes), *part.shape[1:]))
        rows[: len(part)] = part
        everyone = gather(rows, group).unflatten(0, (len(sizes), -1))
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)])

    return gather_any
