"""Triton kernels for three operations of a layer: rotary embedding, the split into heads, and gated activations.

In each pass, forward or backward, a single kernel computes an operation. Only the gradients of norm weights need more:
each program writes a part, and torch adds the parts. All arithmetic is in fp32. Every program writes its own elements,
so results are deterministic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.eager_layer import HeadNorms

ROWS, COLUMNS = 16, 1024
"""In the kernels for heads, each program processes ``ROWS`` tokens. In the kernels for gated activations, each program
processes ``COLUMNS`` elements."""


@triton.jit
def _partners(columns, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return each dimension's partner in the rotation, the index of the angle, and whether the partner comes later."""
    if INTERLEAVED:
        return columns + 1 - 2 * (columns % 2), columns // 2, columns % 2 == 0
    return tl.where(columns < HALF, columns + HALF, columns - HALF), columns % HALF, columns < HALF


@triton.jit
def _turned(values, others, turned, first, angle, token, table, tokens, direction, HALF: tl.constexpr):
    """Rotate ``values``; ``others`` are the values of their partners, and ``turned`` says which values are rotated."""
    where = token.to(tl.int64)[:, None] * HALF + angle
    cos = tl.load(table + where, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(table + tokens.to(tl.int64) * HALF + where, mask=turned, other=0.0).to(tl.float32)
    return values * cos + tl.where(first, -direction, direction) * others * sin


@triton.jit
def _load_turned(source, columns, mask, token, table, tokens, direction,
                 HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Load one head of several tokens, and rotate its first 2 * HALF dimensions. ``source``: a pointer per token."""
    values = tl.load(source[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        partner, angle, first = _partners(columns, HALF, INTERLEAVED)
        turned = mask & (columns < 2 * HALF)
        others = tl.load(source[:, None] + partner, mask=turned, other=0.0).to(tl.float32)
        values = _turned(values, others, turned, first, angle, token, table, tokens, direction, HALF)
    return values


@triton.jit
def _move(source, target, inside, token, table, tokens, direction,
          D: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Copy one head of several tokens, rotated as in `_load_turned`. ``source``, ``target``: a pointer per token."""
    columns = tl.arange(0, PADDED)[None, :]
    mask = inside[:, None] & (columns < D)
    values = _load_turned(source, columns, mask, token, table, tokens, direction, HALF, INTERLEAVED)
    tl.store(target[:, None] + columns, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _normalize(source, target, norm, offset, eps, inside, token, table, tokens,
               D: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Like :func:`_move`, but first divide the head by its root mean square, and multiply it by ``norm + offset``."""
    columns = tl.arange(0, PADDED)[None, :]
    mask = inside[:, None] & (columns < D)
    values = tl.load(source[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / D + eps)[:, None]
    values = values * scale * (tl.load(norm + columns, mask=columns < D, other=0.0).to(tl.float32) + offset)
    if HALF > 0:
        partner, angle, first = _partners(columns, HALF, INTERLEAVED)
        turned = mask & (columns < 2 * HALF)
        others = tl.load(source[:, None] + partner, mask=turned, other=0.0).to(tl.float32) * scale
        others *= tl.load(norm + partner, mask=columns < 2 * HALF, other=0.0).to(tl.float32) + offset
        values = _turned(values, others, turned, first, angle, token, table, tokens, 1.0, HALF)
    tl.store(target[:, None] + columns, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _normalize_backward(
    source, grad, target, sums, norm, offset, eps, inside, token, table, tokens,
    D: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Write ``target``, the input's gradient. SUMS: also write ``sums``, these rows' part of the weight's gradient."""
    columns = tl.arange(0, PADDED)[None, :]
    mask = inside[:, None] & (columns < D)
    g = _load_turned(grad, columns, mask, token, table, tokens, -1.0, HALF, INTERLEAVED)
    values = tl.load(source[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / D + eps)[:, None]
    normed = values * scale
    if SUMS:
        at = tl.arange(0, PADDED)
        tl.store(sums + at, tl.sum(g * normed, 0), mask=at < D)
    g *= tl.load(norm + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    d_values = scale * (g - normed * (tl.sum(g * normed, 1) / D)[:, None])
    tl.store(target[:, None] + columns, d_values.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "batch", "tokens", "direction"])
def _rotate(states, out, table, n, batch, tokens, direction, s_token, s_row, s_head,
            D: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
            TOKENS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    token, row = rows.to(tl.int64) // batch, rows.to(tl.int64) % batch
    source = states + token * s_token + row * s_row + head * s_head
    target = out + (rows.to(tl.int64) * heads + head) * D
    _move(source, target, rows < n, token, table, tokens, direction, D, PADDED, HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["n", "batch", "tokens", "offset", "eps"])
def _split_heads(
    mixed, d_mixed, query, key, value, table, query_norm, key_norm, sums, offset, eps, n, batch, tokens,
    q_token, q_row, q_head, k_token, k_row, k_head, v_token, v_row, v_head,
    QUERIES: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, BACKWARD: tl.constexpr, NORMED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Copy ``mixed`` to ``query``, ``key`` and ``value``, and rotate queries and keys.

    BACKWARD  copy the gradients of queries, keys and values to ``d_mixed``, and rotate the first two back
    NORMED    normalize queries and keys before they are rotated
    SUMS      also write each program's part of the gradient of each norm's weight to ``sums``
    """
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    group, place = slot // (QUERIES + 2), slot % (QUERIES + 2)
    inside = rows < n
    token, row = rows.to(tl.int64) // batch, rows.to(tl.int64) % batch
    at = (rows.to(tl.int64) * slots + slot) * D
    if place > QUERIES:
        part = value + token * v_token + row * v_row + group * v_head
        if BACKWARD:
            _move(part, d_mixed + at, inside, token, table, tokens, 1.0, D, PADDED, 0, INTERLEAVED)
        else:
            _move(mixed + at, part, inside, token, table, tokens, 1.0, D, PADDED, 0, INTERLEAVED)
    else:
        if place < QUERIES:
            part = query + token * q_token + row * q_row + (group * QUERIES + place) * q_head
            norm = query_norm
        else:
            part = key + token * k_token + row * k_row + group * k_head
            norm = key_norm
        if NORMED and BACKWARD:
            into = sums + (tl.program_id(0).to(tl.int64) * slots + slot) * D
            _normalize_backward(mixed + at, part, d_mixed + at, into, norm, offset, eps, inside, token, table, tokens,
                                D, PADDED, HALF, INTERLEAVED, SUMS)  # fmt: skip
        elif NORMED:
            _normalize(mixed + at, part, norm, offset, eps, inside, token, table, tokens,
                       D, PADDED, HALF, INTERLEAVED)  # fmt: skip
        elif BACKWARD:
            _move(part, d_mixed + at, inside, token, table, tokens, -1.0, D, PADDED, HALF, INTERLEAVED)
        else:
            _move(mixed + at, part, inside, token, table, tokens, 1.0, D, PADDED, HALF, INTERLEAVED)


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation of ``gate`` and its derivative."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))  # cumulative normal distribution function
        return gate * below, below + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    below = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
    slope = 2.0 * below * (1.0 - below) * 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    return gate * below, below + gate * slope


@triton.jit(do_not_specialize=["width"])
def _gated_forward(both, out, width, ACTIVATION: tl.constexpr, ELEMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = columns < width
    gate = tl.load(both + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * width + columns, mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activate(gate, ACTIVATION)
    tl.store(out + row * width + columns, (activated * up).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width"])
def _gated_backward(both, grad, d_both, width, ACTIVATION: tl.constexpr, ELEMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = columns < width
    gate = tl.load(both + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * width + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activate(gate, ACTIVATION)
    tl.store(d_both + row * 2 * width + columns, (g * up * slope).to(d_both.dtype.element_ty), mask=mask)
    tl.store(d_both + (row * 2 + 1) * width + columns, (g * activated).to(d_both.dtype.element_ty), mask=mask)


def _constants(table: Tensor | None, width: int, interleaved: bool) -> dict[str, Any]:
    return {
        "D": width,
        "PADDED": triton.next_power_of_2(width),
        "HALF": 0 if table is None else table.shape[-1],
        "INTERLEAVED": interleaved,
        "TOKENS": ROWS,
        "num_warps": 4,
    }


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return _rotated(states, table, 1.0, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, -1.0, ctx.interleaved), None, None


def _rotated(states: Tensor, table: Tensor, direction: float, interleaved: bool) -> Tensor:
    states = _dense(states)
    tokens, rows, heads, width = states.shape
    out = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    grid = (triton.cdiv(tokens * rows, ROWS), heads)
    _rotate[grid](
        states, out, table, tokens * rows, rows, tokens, direction, *states.stride()[:3],
        **_constants(table, width, interleaved),
    )  # fmt: skip
    return out


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        table: Tensor | None,
        interleaved: bool,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        offset: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed = mixed.contiguous()
        norms = None if query_norm is None else HeadNorms(query_norm, key_norm, offset, eps)
        ctx.save_for_backward(table, query_norm, key_norm, mixed if norms else None)
        ctx.interleaved, ctx.offset, ctx.eps = interleaved, offset, eps
        tokens, rows, groups, slots, width = mixed.shape
        query = mixed.new_empty(tokens, rows, groups * (slots - 2), width)
        key, value = (mixed.new_empty(tokens, rows, groups, width) for _ in range(2))
        _split(mixed, None, query, key, value, table, interleaved, norms, None)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Tensor | None, ...]:
        table, query_norm, key_norm, mixed = ctx.saved_tensors
        slots = d_query.shape[2] // d_key.shape[2] + 2
        d_mixed = d_key.new_empty(*d_key.shape[:3], slots, d_key.shape[3])
        norms = None if query_norm is None else HeadNorms(query_norm, key_norm, ctx.offset, ctx.eps)
        wanted, sums = ctx.needs_input_grad[3:5], None
        if any(wanted):
            blocks = triton.cdiv(d_key.shape[0] * d_key.shape[1], ROWS)
            sums = d_key.new_empty(blocks, *d_mixed.shape[2:], dtype=torch.float32)
        parts = (_dense(grad) for grad in (d_query, d_key, d_value))
        _split(mixed, d_mixed, *parts, table, ctx.interleaved, norms, sums)
        d_norms: list[Tensor | None] = [None, None]
        if wanted[0]:
            d_norms[0] = sums[:, :, :-2].sum((0, 1, 2)).to(query_norm.dtype)
        if wanted[1]:
            d_norms[1] = sums[:, :, -2].sum((0, 1)).to(key_norm.dtype)
        return d_mixed, None, None, *d_norms, None, None


def _split(
    mixed: Tensor | None,
    d_mixed: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    interleaved: bool,
    norms: HeadNorms | None,
    sums: Tensor | None,
) -> None:
    """Run the kernel forward or, with ``d_mixed``, backward. The kernel gets ``query`` in place of None."""
    tokens, rows, groups, slots, width = (mixed if d_mixed is None else d_mixed).shape
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:3]]
    unused = query
    pointers = (table, norms.query if norms else None, norms.key if norms else None, sums)
    _split_heads[(triton.cdiv(tokens * rows, ROWS), groups * slots)](
        *(unused if tensor is None else tensor for tensor in (mixed, d_mixed, query, key, value, *pointers)),
        norms.offset if norms else 0.0, norms.eps if norms else 0.0, tokens * rows, rows, tokens, *strides,
        QUERIES=slots - 2, BACKWARD=d_mixed is not None, NORMED=norms is not None, SUMS=sums is not None,
        **_constants(table, width, interleaved),
    )  # fmt: skip


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: str) -> Tensor:
        both = both.contiguous()
        ctx.save_for_backward(both)
        ctx.activation = activation
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        if out.numel():
            _gated_forward[_gate_grid(out)](both, out, width, ACTIVATION=activation, ELEMENTS=COLUMNS, num_warps=4)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        grad, d_both = grad.contiguous(), torch.empty_like(both)
        if grad.numel():
            _gated_backward[_gate_grid(grad)](
                both, grad, d_both, grad.shape[-1], ACTIVATION=ctx.activation, ELEMENTS=COLUMNS, num_warps=4
            )
        return d_both, None


def _gate_grid(out: Tensor) -> tuple[int, int]:
    return out.numel() // out.shape[-1], triton.cdiv(out.shape[-1], COLUMNS)


def _check(tensor: Tensor, name: str) -> None:
    if tensor.dtype == torch.float64:
        raise ValueError(f"triton {name}: does not support fp64, because it computes in fp32; use the backend eager")


def rotate(states: Tensor, table: Tensor, interleaved: bool = False) -> Tensor:
    """Like :func:`dpo_kernels.eager_layer.rotate`. Raises ``ValueError`` for fp64."""
    _check(states, "rotate")
    return _Rotation.apply(states, table, interleaved)


def split_heads(
    mixed: Tensor, table: Tensor | None, interleaved: bool = False, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`dpo_kernels.eager_layer.split_heads`. Raises ``ValueError`` for fp64."""
    _check(mixed, "split_heads")
    return _SplitHeads.apply(mixed, table, interleaved, *(norms or (None, None, 0.0, 0.0)))


def gated(both: Tensor, activation: str = "silu") -> Tensor:
    """Like :func:`dpo_kernels.eager_layer.gated`. Raises ``ValueError`` for fp64."""
    _check(both, "gated")
    return _Gated.apply(both, activation)
