"""The operations of the output layer in Triton: statistics for log-probabilities, and gradients.

Both have two variants: one stores the logits, and the other does not.

Problem. The functions in :mod:`dpo_kernels.eager` write a chunk of logits in fp32 and make several passes over it:
maximum, exponential, sums, target. With a vocabulary of 128k, memory bandwidth limits the speed of these passes.

Solution, if the logits are kept. In :func:`linear_keep`, the GPU vendor's library computes the matrix product. A kernel
then reads each row once and computes all statistics online: if a block of columns has a new maximum, the previous sums
are rescaled. :func:`linear_kept_grad` reads the logits once more and writes their gradient in the weight's dtype.

Solution, if the logits are not kept. :func:`linear_stats` fuses the product with the online statistics. A program
computes a tile of 128 x 128 logits in registers, adds it to its sums and discards it, so logits never reach memory. The
vocabulary is divided into up to 8 parts that run in parallel, because a small number of rows would not occupy the whole
GPU. torch merges the results of the parts. :func:`linear_grad` computes each tile again and writes only the gradient of
a chunk's logits.

Why this way. The vendor's library computes the two matrix products of the backward pass, because a Triton kernel would
not be faster. There are no atomics, and block sizes are constants rather than autotuned, so repeated runs give bitwise
identical results. Running maxima start at a large negative finite number, because -inf minus -inf is NaN.

Not covered. fp64 is rejected, because sums are in fp32. :func:`linear_grad` still stores the gradient of a chunk's
logits, and :func:`linear_keep` stores a chunk's logits. Triton's interpreter cannot multiply bf16, so operands are
converted to fp32 there. Block sizes have not been tuned on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.eager import KeptLogits, LinearStats, linear_logits, linear_products

COLUMNS = 2048
"""Number of logits of one row that a program processes at a time."""

ROWS, VOCAB, INNER = 128, 128, 64
"""Tile sizes for the output layer's product: rows, columns, and step along the hidden dimension."""

SPLITS = 8
"""Maximum number of vocabulary parts that run in parallel. With few rows, a single part would not occupy a GPU."""


@triton.jit
def _add_columns(x, real, maximum, sum_exp, sum_exp_twice, sum_exp_logit, MOMENTS: tl.constexpr):
    """Add a tile ``x`` [rows, columns] to the running sums of its rows. ``x`` is -inf where ``real`` is false."""
    higher = tl.maximum(maximum, tl.max(x, 1))
    shrink = tl.exp(maximum - higher)
    weights = tl.exp(x - higher[:, None])
    sum_exp = sum_exp * shrink + tl.sum(weights, 1)
    if MOMENTS:
        sum_exp_twice = sum_exp_twice * shrink * shrink + tl.sum(weights * weights, 1)
        sum_exp_logit = sum_exp_logit * shrink + tl.sum(weights * tl.where(real, x, 0.0), 1)
    return higher, sum_exp, sum_exp_twice, sum_exp_logit


@triton.jit
def _capped(x, scale, softcap, CAPPED: tl.constexpr):
    """Compute the logits from the matrix product: multiply by the scale, then apply the soft cap."""
    x = x * scale
    if CAPPED:
        # tanh, written with an exponential that cannot overflow
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        x = tl.where(x < 0, -softcap, softcap) * (1.0 - e) / (1.0 + e)
    return x


@triton.jit
def _d_logits(x, real, hit, lse, grad, scale, softcap, CAPPED: tl.constexpr):
    """Turn a tile of scaled and capped logits into the gradient of the unscaled product; 0 in padding columns."""
    d = grad[:, None] * (tl.where(hit, 1.0, 0.0) - tl.exp(x - lse[:, None])) * scale
    if CAPPED:
        d = d * (1.0 - (x / softcap) * (x / softcap))
    return tl.where(real, d, 0.0)


@triton.jit(do_not_specialize=["n"])
def _stats_of_logits(logits, targets, sums, n, row_stride, start, valid, MOMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    target = tl.load(targets + row) - start
    maximum = tl.full([1], -1.0e30, tl.float32)
    sum_exp = tl.zeros([1], tl.float32)
    sum_exp_twice = tl.zeros([1], tl.float32)
    sum_exp_logit = tl.zeros([1], tl.float32)
    target_logit = tl.zeros([1], tl.float32)
    for first in range(0, valid, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        real = (columns < valid)[None, :]
        x = tl.load(logits + row.to(tl.int64) * row_stride + columns, mask=columns < valid, other=-float("inf"))
        x = x.to(tl.float32)[None, :]
        maximum, sum_exp, sum_exp_twice, sum_exp_logit = _add_columns(
            x, real, maximum, sum_exp, sum_exp_twice, sum_exp_logit, MOMENTS
        )
        target_logit += tl.sum(tl.where(real & (columns == target)[None, :], x, 0.0), 1)
    here = sums + row + tl.arange(0, 1)
    tl.store(here, maximum)
    tl.store(here + n, sum_exp)
    tl.store(here + 2 * n, target_logit)
    if MOMENTS:
        tl.store(here + 3 * n, sum_exp_twice)
        tl.store(here + 4 * n, sum_exp_logit)


@triton.jit
def _grad_of_logits(
    logits, targets, lse, grad, out, row_stride, width, start, valid, scale, softcap,
    CAPPED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(targets + row) - start
    only = row + tl.arange(0, 1)
    x = tl.load(logits + row.to(tl.int64) * row_stride + columns, mask=columns < valid, other=0.0).to(tl.float32)
    real, hit = (columns < valid)[None, :], (columns == target)[None, :]
    d = _d_logits(x[None, :], real, hit, tl.load(lse + only), tl.load(grad + only), scale, softcap, CAPPED)
    where = row.to(tl.int64) * width + columns
    tl.store(out + where[None, :], d.to(out.dtype.element_ty), mask=(columns < width)[None, :])


@triton.jit
def _product_tile(
    hidden, weight, rows, columns, n, valid, h, hidden_stride, weight_stride,
    ROWS: tl.constexpr, VOCAB: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute a tile [ROWS, VOCAB] of the matrix product. Elements outside the matrix are 0."""
    left = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    right = weight + columns.to(tl.int64)[:, None] * weight_stride
    acc = tl.zeros([ROWS, VOCAB], tl.float32)
    for first in range(0, h, INNER):
        inner = first + tl.arange(0, INNER)
        a = tl.load(left + inner[None, :], mask=(rows < n)[:, None] & (inner < h)[None, :], other=0.0)
        b = tl.load(right + inner[None, :], mask=(columns < valid)[:, None] & (inner < h)[None, :], other=0.0)
        acc += tl.dot(a, tl.trans(b), input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["n"])
def _stats_of_linear(
    hidden, weight, targets, sums, n, h, hidden_stride, weight_stride, start, valid, split_width, scale, softcap,
    CAPPED: tl.constexpr, MOMENTS: tl.constexpr, ROWS: tl.constexpr, VOCAB: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Neighboring programs read the same part of the weight, so it stays in cache.
    rows, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    target = tl.load(targets + rows, mask=rows < n, other=-1) - start
    maximum = tl.full([ROWS], -1.0e30, tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    sum_exp_twice = tl.zeros([ROWS], tl.float32)
    sum_exp_logit = tl.zeros([ROWS], tl.float32)
    target_logit = tl.zeros([ROWS], tl.float32)
    for first in range(split * split_width, tl.minimum(split * split_width + split_width, valid), VOCAB):
        columns = first + tl.arange(0, VOCAB)
        real = (columns < valid)[None, :]
        x = _product_tile(hidden, weight, rows, columns, n, valid, h, hidden_stride, weight_stride, ROWS, VOCAB, INNER)
        x = tl.where(real, _capped(x, scale, softcap, CAPPED), -float("inf"))
        maximum, sum_exp, sum_exp_twice, sum_exp_logit = _add_columns(
            x, real, maximum, sum_exp, sum_exp_twice, sum_exp_logit, MOMENTS
        )
        target_logit += tl.sum(tl.where(real & (columns[None, :] == target[:, None]), x, 0.0), 1)
    count = tl.num_programs(1) * n
    here = sums + split * n + rows
    tl.store(here, maximum, mask=rows < n)
    tl.store(here + count, sum_exp, mask=rows < n)
    tl.store(here + 2 * count, target_logit, mask=rows < n)
    if MOMENTS:
        tl.store(here + 3 * count, sum_exp_twice, mask=rows < n)
        tl.store(here + 4 * count, sum_exp_logit, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _grad_of_linear(
    hidden, weight, targets, lse, grad, out, n, h, hidden_stride, weight_stride, width, start, valid, scale, softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, VOCAB: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * VOCAB + tl.arange(0, VOCAB)
    target = tl.load(targets + rows, mask=rows < n, other=-1) - start
    x = _product_tile(hidden, weight, rows, columns, n, valid, h, hidden_stride, weight_stride, ROWS, VOCAB, INNER)
    x = _capped(x, scale, softcap, CAPPED)
    row_lse = tl.load(lse + rows, mask=rows < n, other=float("inf"))
    row_grad = tl.load(grad + rows, mask=rows < n, other=0.0)
    hit = columns[None, :] == target[:, None]
    d = _d_logits(x, (columns < valid)[None, :], hit, row_lse, row_grad, scale, softcap, CAPPED)
    where = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + where, d.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (columns < width)[None, :])


def _refuse_fp64(hidden: Tensor) -> None:
    if hidden.dtype == torch.float64:
        raise ValueError("triton output layer: does not support fp64, because it sums in fp32; use the backend eager")


def _no_column_is_valid(rows: Tensor, moments: bool) -> LinearStats:
    zero = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
    return LinearStats(zero - torch.inf, zero, zero.clone(), *((zero.clone(), zero.clone()) if moments else ()))


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    start: int,
    valid: int,
    *,
    chunk: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    moments: bool = False,
) -> LinearStats:
    """Like :func:`dpo_kernels.eager.linear_stats`, but never stores logits, so ``chunk`` has no effect.

    Raises ``ValueError`` for fp64.
    """
    _refuse_fp64(hidden)
    n = len(hidden)
    if not valid or not n:
        return _no_column_is_valid(hidden, moments)
    hidden, weight = _plain(hidden), _plain(weight)
    tiles = triton.cdiv(valid, VOCAB)
    split_width = triton.cdiv(tiles, min(SPLITS, tiles)) * VOCAB
    splits = triton.cdiv(valid, split_width)
    sums = torch.empty(5 if moments else 3, splits, n, dtype=torch.float32, device=hidden.device)
    _stats_of_linear[(triton.cdiv(n, ROWS), splits)](
        hidden, weight, targets, sums, n, hidden.shape[1], hidden.stride(0), weight.stride(0), start, valid,
        split_width, logit_scale, softcap or 1.0, CAPPED=softcap is not None, MOMENTS=moments,
        ROWS=ROWS, VOCAB=VOCAB, INNER=INNER, num_warps=8, num_stages=3,
    )  # fmt: skip
    maximum = sums[0].amax(dim=0)
    factor = (sums[0] - maximum).exp()
    merged = [maximum, (sums[1] * factor).sum(dim=0), sums[2].sum(dim=0)]
    if moments:
        merged += [(sums[3] * factor.square()).sum(dim=0), (sums[4] * factor).sum(dim=0)]
    return LinearStats(*merged)


def linear_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    start: int,
    valid: int,
    *,
    chunk: int,
    d_weight: Tensor | None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Like :func:`dpo_kernels.eager.linear_grad`, but stores only the gradient of a chunk's logits, not the logits.

    The gradient of the logits is in the weight's dtype. The vendor's library computes the two matrix products.

    Raises ``ValueError`` for fp64.
    """
    _refuse_fp64(hidden)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    right = _plain(weight)
    width, h = weight.shape
    for first in range(0, len(hidden), chunk):
        part = slice(first, first + chunk)
        left = _plain(hidden[part])
        n = len(left)
        d_logits = weight.new_empty(n, width)
        _grad_of_linear[(triton.cdiv(n, ROWS), triton.cdiv(width, VOCAB))](
            left, right, targets[part], lse[part], grad[part].contiguous(), d_logits, n, h,
            left.stride(0), right.stride(0), width, start, valid, logit_scale, softcap or 1.0,
            CAPPED=softcap is not None, ROWS=ROWS, VOCAB=VOCAB, INNER=INNER, num_warps=8, num_stages=3,
        )  # fmt: skip
        d_hidden[part] = linear_products(d_logits, hidden[part], weight, d_weight)
    return d_hidden


def linear_keep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    start: int,
    valid: int,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    moments: bool = False,
) -> tuple[LinearStats, KeptLogits]:
    """Like :func:`dpo_kernels.eager.linear_keep`. One pass over the logits computes all statistics.

    Raises ``ValueError`` for fp64.
    """
    _refuse_fp64(hidden)
    logits = linear_logits(hidden, weight, logit_scale, softcap)
    kept = KeptLogits(logits, hidden, weight, targets, start, valid, logit_scale, softcap)
    if not valid or not len(logits):
        return _no_column_is_valid(logits, moments), kept
    sums = logits.new_empty(5 if moments else 3, len(logits))
    _stats_of_logits[(len(logits),)](
        logits, targets, sums, len(logits), logits.stride(0), start, valid, MOMENTS=moments, COLUMNS=COLUMNS
    )
    return LinearStats(*sums), kept


def linear_kept_grad(kept: KeptLogits, lse: Tensor, grad: Tensor, *, d_weight: Tensor | None) -> Tensor:
    """Like :func:`dpo_kernels.eager.linear_kept_grad`, but read the logits only once, and never overwrite them."""
    d_logits = torch.empty_like(kept.logits, dtype=kept.weight.dtype)
    n, width = d_logits.shape
    if d_logits.numel():
        _grad_of_logits[(n, triton.cdiv(width, COLUMNS))](
            kept.logits, kept.targets, lse, grad.contiguous(), d_logits, kept.logits.stride(0), width, kept.start,
            kept.valid, kept.logit_scale, kept.softcap or 1.0, CAPPED=kept.softcap is not None, COLUMNS=COLUMNS,
        )  # fmt: skip
    return linear_products(d_logits, kept.hidden, kept.weight, d_weight)


def _plain(matrix: Tensor) -> Tensor:
    """Return a matrix with contiguous rows, in fp32 under Triton's interpreter.

    The interpreter stores bf16 values as integers and would multiply these integers.
    """
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return matrix if matrix.is_cuda else matrix.float()
