"""CPU versions of operations that are fused kernels on a GPU. They need few memory passes and few buffers."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_PRODUCT = 1 << 20
"""Matrix products with fewer multiplications than this use torch's default, because oneDNN would be slower for them."""


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    out = torch.empty_like(states)
    turned = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned[0]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned[1]).addcmul_(first, sin, value=direction)
    return out


def rotate(states: Tensor, angles: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate each pair of head dimensions ``(i, i + d/2)`` by its token's angle (rotary position embedding).

    states   [s, b, n, d]
    angles   [s, 1, 1, d]  radians; the two halves of the last axis are equal. The cosines and sines are cached as an
                           attribute of this tensor, so that they are computed once for all layers with the same angles
    Returns  [s, b, n, d]

    *Source*: RoFormer (arXiv 2104.09864) eq. 34, with dimensions paired as in GPT-NeoX.
    Raises ``ValueError`` if ``interleaved`` is true, which means that adjacent dimensions are paired.
    """
    if interleaved:
        raise ValueError("rotate: interleaved=True is not supported; dimensions i and i + d/2 must form a pair")
    known = getattr(angles, "cos_and_sin", None)
    if known is None or known[0].dtype != states.dtype:
        half = angles[..., : angles.shape[-1] // 2]
        known = angles.cos_and_sin = half.cos().to(states.dtype), half.sin().to(states.dtype)
    return _Rotation.apply(states, *known)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(grad, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        torch.mul(grad, F.silu(gate), out=d_up)
        return out


def swiglu(both: Tensor, bias: Tensor | None, *store: bool) -> Tensor:
    """Compute ``silu(gate) * up``. The backward pass recomputes ``silu(gate)``, so that it need not be stored.

    both     [..., 2 f]  gate and up, concatenated
    bias     must be None, as it is in all supported models with this activation
    store    Megatron's options for storing ``both`` for the backward pass; all must be false
    Returns  [..., f]

    *Source*: GLU variants (arXiv 2002.05202) eq. 6.
    Raises ``ValueError`` if there is a bias or a storage option is true.
    """
    if bias is not None or any(store):
        raise ValueError("swiglu: a bias and storage options are not supported")
    return _SwiGLU.apply(both)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(wide, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x * scale, weight.to(scale.dtype)
        products = grad * normed
        along = (products @ wide).div_(x.shape[-1])[..., None]
        d_x = torch.mul(grad, wide).addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return d_x, products.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``x weight / sqrt(mean(x^2) + eps)`` over the last axis, in at least fp32.

    The normalized ``x`` is not stored for the backward pass.

    x        [..., h]
    weight   [h]
    Returns  [..., h]  in the dtype of ``x``

    *Source*: RMSNorm (arXiv 1910.07467) eq. 4.
    """
    return _RMSNorm.apply(x, weight, eps)


class WeightGradients:
    """A replacement for Apex's extension ``fused_weight_gradient_mlp_cuda``, with the same interface."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """Add ``grad.T @ inputs`` to ``main_grad``.

        inputs  [n, i]        grad  [n, o]        main_grad  [o, i] fp32
        """
        main_grad.add_(grad.T @ inputs)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
    """Apex's name of the same operation for a ``main_grad`` in 16 bits."""


def mkl_is_slow() -> bool:
    """Whether MKL, which torch uses for matrix products by default, is slow on this processor, but oneDNN is available.

    MKL is Intel's library. On other processors, it uses only 256-bit kernels. oneDNN uses the widest vectors that the
    processor supports.
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
