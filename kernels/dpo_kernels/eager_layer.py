"""The reference implementation, in plain torch, of a layer's operations other than matrix products and attention.

The autograd functions make few passes over memory. For the backward pass, they save at most their inputs, and the norm
also saves one scale per row.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def _turn(states: Tensor, out: Tensor, table: Tensor | None, direction: int, interleaved: bool) -> None:
    """Write ``states`` [s, ..., d] to ``out``, rotated forward (``direction`` 1) or back (-1)."""
    if table is None:
        out.copy_(states)
        return
    half = table.shape[-1]
    cos, sin = table.view(2, len(states), *[1] * (states.dim() - 2), half).unbind(0)

    def pairs(tensor: Tensor) -> tuple[Tensor, Tensor]:
        if interleaved:
            return tensor[..., 0 : 2 * half : 2], tensor[..., 1 : 2 * half : 2]
        return tensor[..., :half], tensor[..., half : 2 * half]

    (first, second), turned = pairs(states), pairs(out)
    torch.mul(first, cos, out=turned[0]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned[1]).addcmul_(first, sin, value=direction)
    if 2 * half < states.shape[-1]:
        out[..., 2 * half :] = states[..., 2 * half :]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        out = torch.empty(states.shape, dtype=states.dtype, device=states.device)
        _turn(states, out, table, 1, interleaved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _turn(grad, out, *ctx.saved_tensors, -1, ctx.interleaved)
        return out, None, None


def rotate(states: Tensor, table: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of head dimensions by the angles of each token (rotary position embedding).

    The first w dimensions form pairs ``(i, i + w/2)``, or ``(2i, 2i + 1)`` if ``interleaved``. The other dimensions
    are copied.

    states   [s, b, n, d], d >= w
    table    [2, s, w/2]  cosines and sines of the angles, in the dtype of ``states``
    Returns  [s, b, n, d]

    *Source*: RoFormer (arXiv 2104.09864) eq. 34.
    """
    return _Rotation.apply(states, table, interleaved)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        columns, rows, groups, slots, width = mixed.shape
        query = mixed.new_empty(columns, rows, groups, slots - 2, width)
        key, value = (mixed.new_empty(columns, rows, groups, width) for _ in range(2))
        _turn(mixed[..., :-2, :], query, table, 1, interleaved)
        _turn(mixed[..., -2, :], key, table, 1, interleaved)
        value.copy_(mixed[..., -1, :])
        return query.flatten(2, 3), key, value

    @staticmethod
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        groups = d_key.shape[2]
        slots = d_query.shape[2] // groups + 2
        d_mixed = d_key.new_empty(*d_key.shape[:3], slots, d_key.shape[3])
        _turn(d_query.unflatten(2, (groups, slots - 2)), d_mixed[..., :-2, :], table, -1, ctx.interleaved)
        _turn(d_key, d_mixed[..., -2, :], table, -1, ctx.interleaved)
        d_mixed[..., -1, :] = d_value
        return d_mixed, None, None


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


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute ``x (weight + offset) / sqrt(mean(x^2) + eps)`` over the last axis, in at least fp32.

    The normalized ``x`` is not stored for the backward pass.

    x        [..., h]
    weight   [h]
    Returns  [..., h]  in the dtype of ``x``

    *Source*: RMSNorm (arXiv 1910.07467) eq. 4.
    """
    if offset:  # add in at least fp32, because a sum in 16 bits would lose digits of the weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    return _RMSNorm.apply(x, weight, eps)


class HeadNorms(NamedTuple):
    """Root-mean-square norms of each query head and each key head.

    query, key  [d]  weights
    offset      number that is added to the weights
    eps         number that is added to the mean square
    """

    query: Tensor
    key: Tensor
    offset: float
    eps: float


def split_heads(
    mixed: Tensor, table: Tensor | None, interleaved: bool = False, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of the query, key and value projection; normalize and :func:`rotate` the queries and keys.

    mixed    [s, b, g, n + 2, d]  for each of g key heads: its n query heads, the key head, and the value head
    table    [2, s, w/2], as in :func:`rotate`; None: nothing is rotated
    norms    applied before the rotation; None: nothing is normalized
    Returns  queries [s, b, g * n, d], keys [s, b, g, d], values [s, b, g, d]; all contiguous
    """
    if norms is None:
        return _SplitHeads.apply(mixed, table, interleaved)
    query, key, value = _SplitHeads.apply(mixed, None, interleaved)
    query = rms_norm(query, norms.query, norms.eps, norms.offset)
    key = rms_norm(key, norms.key, norms.eps, norms.offset)
    if table is not None:
        query, key = rotate(query, table, interleaved), rotate(key, table, interleaved)
    return query, key, value


GATES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "silu": (F.silu, aten.silu_backward.grad_input, {}),
    "gelu": (F.gelu, aten.gelu_backward.grad_input, {"approximate": "none"}),
    "gelu_tanh": (F.gelu, aten.gelu_backward.grad_input, {"approximate": "tanh"}),
}
"""Activations of gates by name: the function, its gradient, and options of both."""


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        gate, up = both.chunk(2, dim=-1)
        function, _, options = GATES[activation]
        return function(gate, **options).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        function, gradient, options = GATES[ctx.activation]
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(grad, up, out=d_gate)
        gradient(d_gate, gate, **options, grad_input=d_gate)
        torch.mul(grad, function(gate, **options), out=d_up)
        return out, None


def gated(both: Tensor, activation: str = "silu") -> Tensor:
    """Compute ``activation(gate) * up``. The backward pass computes the activation again, so it need not be stored.

    both        [..., 2 f]  gate and up, concatenated
    activation  a name in GATES; ``gelu_tanh`` is the approximation of GELU by a hyperbolic tangent
    Returns     [..., f]

    *Source*: GLU variants (arXiv 2002.05202) eq. 6.
    """
    return _Gated.apply(both, activation)
