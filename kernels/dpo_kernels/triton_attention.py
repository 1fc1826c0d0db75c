"""Tree attention in Triton: each block of queries visits only some blocks of keys.

These are the blocks of keys with a visible (query, key) pair and, with a window, a few others. A block of neighboring
tokens can span several segments and trees, so segments need no padding. The backward pass uses no atomics. Each block
of queries sums its dQ over its blocks of keys, and each block of keys sums its dK and dV over the blocks of queries
that visit it, in a fixed order. Block sizes come from a table. Autotuning could choose different block sizes in another
run, and results would then differ by rounding.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_kernels.tile_attention import sink_gradient
from dpo_kernels.tiles import Blocks, TileMap, blocks_for, tile_map
from dpo_kernels.tree import Tree

INTERPRETED = Blocks(queries=128, keys=64, warps=8, stages=3, key_stages=2)
"""Block sizes for Triton's interpreter, whose run time grows with the number of blocks."""
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(base, rows, limit, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load rows of a matrix with row stride ``stride`` as a tile [rows, PADDED]; elements outside the matrix are 0."""
    columns = tl.arange(0, PADDED)
    where = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(base + where, mask=(rows < limit)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, limit, stride, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    where = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < limit)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + where, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _scores(
    q, k, rows, keys, first, stop, queries_at, keys_at, window, scale, softcap,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Compute the scores of a tile, and the soft cap's derivative. Scores and ``softcap`` are divided by ln 2.

    A score is -inf if the key is not visible. The soft cap is applied before the scores are masked, because it would
    turn -inf into a finite score.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    slope = 1.0
    if CAPPED:
        # tanh, written with an exponential that cannot overflow
        e = tl.exp(-2.0 * tl.abs(scores) / softcap)
        share = tl.where(scores < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        scores = softcap * share
        slope = 1.0 - share * share
    if MASKED:
        begin, end = tl.load(first + keys)[None, :], tl.load(stop + keys)[None, :]
        visible = (begin <= rows[:, None]) & (rows[:, None] < end)
        if WINDOWED:
            visible = visible & (tl.load(queries_at + rows)[:, None] - tl.load(keys_at + keys)[None, :] < window)
        scores = tl.where(visible, scores, -float("inf"))
    return scores, slope


@triton.jit
def _forward_tiles(
    q, k_base, v_base, k_stride, v_stride, rows, first, stop, queries_at, keys_at,
    tiles, begin, end, n, window, scale, softcap, maximum, total, acc,
    D: tl.constexpr, D_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    for tile in range(begin, end):
        keys = tl.load(tiles + tile) * KEYS + tl.arange(0, KEYS)
        k = _load_rows(k_base, keys, n, k_stride, D, D_PADDED)
        scores, slope = _scores(
            q, k, rows, keys, first, stop, queries_at, keys_at, window, scale, softcap, MASKED, WINDOWED, CAPPED
        )
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.math.exp2(scores - higher[:, None])
        shrink = tl.math.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = _load_rows(v_base, keys, n, v_stride, V, V_PADDED)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = higher
    return maximum, total, acc


@triton.jit(do_not_specialize=["n_q", "n"])
def _forward(
    query, key, value, out, lse, sinks, first, stop, queries_at, keys_at,
    order, bounds, tiles, n_q, n, window, scale, softcap,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    block, head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    rows = block * QUERIES + tl.arange(0, QUERIES)
    q = _load_rows(query + head * q_head, rows, n_q, q_row, D, D_PADDED)
    k_base, v_base = key + (head // GROUP) * k_head, value + (head // GROUP) * v_head
    # Start with a finite value. Otherwise, a row that sees no key in its first tile would compute -inf minus -inf.
    maximum = tl.full([QUERIES], -1.0e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if SINKS:  # a key with value 0, which all queries see
        maximum = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + head)
        total = tl.full([QUERIES], 1.0, tl.float32)
    acc = tl.zeros([QUERIES, V_PADDED], tl.float32)
    begin, partly, end = tl.load(bounds + 3 * block), tl.load(bounds + 3 * block + 1), tl.load(bounds + 3 * block + 2)
    maximum, total, acc = _forward_tiles(
        q, k_base, v_base, k_row, v_row, rows, first, stop, queries_at, keys_at,
        tiles, begin, partly, n, window, scale, softcap, maximum, total, acc,
        D, D_PADDED, V, V_PADDED, KEYS, False, WINDOWED, CAPPED,
    )  # fmt: skip
    maximum, total, acc = _forward_tiles(
        q, k_base, v_base, k_row, v_row, rows, first, stop, queries_at, keys_at,
        tiles, partly, end, n, window, scale, softcap, maximum, total, acc,
        D, D_PADDED, V, V_PADDED, KEYS, True, WINDOWED, CAPPED,
    )  # fmt: skip
    total = tl.where(rows < n_q, total, 1.0)
    _store_rows(out + head * o_head, rows, n_q, o_row, acc / total[:, None], V, V_PADDED)
    tl.store(lse + head * n_q + rows, maximum + tl.math.log2(total), mask=rows < n_q)


@triton.jit
def _query_tiles(
    q, d_out, row_lse, delta, k_base, v_base, k_stride, v_stride, rows, first, stop, queries_at, keys_at,
    tiles, begin, end, n, window, scale, softcap, acc,
    D: tl.constexpr, D_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    for tile in range(begin, end):
        keys = tl.load(tiles + tile) * KEYS + tl.arange(0, KEYS)
        k = _load_rows(k_base, keys, n, k_stride, D, D_PADDED)
        v = _load_rows(v_base, keys, n, v_stride, V, V_PADDED)
        scores, slope = _scores(
            q, k, rows, keys, first, stop, queries_at, keys_at, window, scale, softcap, MASKED, WINDOWED, CAPPED
        )
        weights = tl.math.exp2(scores - row_lse[:, None])
        d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None]) * slope
        acc += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["n_q", "n"])
def _backward_query(
    query, key, value, out, lse, d_out, delta, d_query, first, stop, queries_at, keys_at,
    order, bounds, tiles, n_q, n, window, scale, softcap,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    rows = block * QUERIES + tl.arange(0, QUERIES)
    inside = rows < n_q
    q = _load_rows(query + head * q_head, rows, n_q, q_row, D, D_PADDED)
    o = _load_rows(out + head * o_head, rows, n_q, o_row, V, V_PADDED)
    do = _load_rows(d_out + head * o_head, rows, n_q, o_row, V, V_PADDED)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + head * n_q + rows, row_delta, mask=inside)  # for _backward_key
    row_lse = tl.load(lse + head * n_q + rows, mask=inside, other=float("inf"))  # rows after the end get weight 0
    k_base, v_base = key + (head // GROUP) * k_head, value + (head // GROUP) * v_head
    acc = tl.zeros([QUERIES, D_PADDED], tl.float32)
    begin, partly, end = tl.load(bounds + 3 * block), tl.load(bounds + 3 * block + 1), tl.load(bounds + 3 * block + 2)
    acc = _query_tiles(
        q, do, row_lse, row_delta, k_base, v_base, k_row, v_row, rows, first, stop, queries_at, keys_at,
        tiles, begin, partly, n, window, scale, softcap, acc,
        D, D_PADDED, V, V_PADDED, KEYS, False, WINDOWED, CAPPED,
    )  # fmt: skip
    acc = _query_tiles(
        q, do, row_lse, row_delta, k_base, v_base, k_row, v_row, rows, first, stop, queries_at, keys_at,
        tiles, partly, end, n, window, scale, softcap, acc,
        D, D_PADDED, V, V_PADDED, KEYS, True, WINDOWED, CAPPED,
    )  # fmt: skip
    # Scores are divided by ln 2, so `scale` is the actual scale divided by ln 2.
    _store_rows(d_query + head * D, rows, n_q, tl.num_programs(1) * D, acc * (scale * LN_2), D, D_PADDED)


@triton.jit
def _key_tiles(
    k, v, q_base, d_out_base, lse_base, delta_base, q_stride, o_stride, keys, first, stop, queries_at, keys_at,
    tiles, begin, end, n_q, window, scale, softcap, dk, dv,
    D: tl.constexpr, D_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr, QUERIES: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    for tile in range(begin, end):
        rows = tl.load(tiles + tile) * QUERIES + tl.arange(0, QUERIES)
        inside = rows < n_q
        q = _load_rows(q_base, rows, n_q, q_stride, D, D_PADDED)
        do = _load_rows(d_out_base, rows, n_q, o_stride, V, V_PADDED)
        row_lse = tl.load(lse_base + rows, mask=inside, other=float("inf"))
        row_delta = tl.load(delta_base + rows, mask=inside, other=0.0)
        scores, slope = _scores(
            q, k, rows, keys, first, stop, queries_at, keys_at, window, scale, softcap, MASKED, WINDOWED, CAPPED
        )
        weights = tl.math.exp2(scores - row_lse[:, None])
        dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision="ieee")
        d_scores = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_delta[:, None]) * slope
        dk += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["n_q", "n"])
def _backward_key(
    query, key, value, lse, d_out, delta, d_key, d_value, first, stop, queries_at, keys_at,
    order, bounds, tiles, n_q, n, window, scale, softcap,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, kv_head = tl.load(order + tl.program_id(0)), tl.program_id(1)
    keys = block * KEYS + tl.arange(0, KEYS)
    k = _load_rows(key + kv_head * k_head, keys, n, k_row, D, D_PADDED)
    v = _load_rows(value + kv_head * v_head, keys, n, v_row, V, V_PADDED)
    dk = tl.zeros([KEYS, D_PADDED], tl.float32)
    dv = tl.zeros([KEYS, V_PADDED], tl.float32)
    begin, partly, end = tl.load(bounds + 3 * block), tl.load(bounds + 3 * block + 1), tl.load(bounds + 3 * block + 2)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        q_base, do_base = query + head * q_head, d_out + head * o_head
        lse_base, delta_base = lse + head * n_q, delta + head * n_q
        dk, dv = _key_tiles(
            k, v, q_base, do_base, lse_base, delta_base, q_row, o_row, keys, first, stop, queries_at, keys_at,
            tiles, begin, partly, n_q, window, scale, softcap, dk, dv, D, D_PADDED, V, V_PADDED, QUERIES, False,
            WINDOWED, CAPPED,
        )  # fmt: skip
        dk, dv = _key_tiles(
            k, v, q_base, do_base, lse_base, delta_base, q_row, o_row, keys, first, stop, queries_at, keys_at,
            tiles, partly, end, n_q, window, scale, softcap, dk, dv, D, D_PADDED, V, V_PADDED, QUERIES, True,
            WINDOWED, CAPPED,
        )  # fmt: skip
    kv_heads = tl.num_programs(1)
    _store_rows(d_key + kv_head * D, keys, n, kv_heads * D, dk * (scale * LN_2), D, D_PADDED)
    _store_rows(d_value + kv_head * V, keys, n, kv_heads * V, dv, V, V_PADDED)


class Options(NamedTuple):
    """The options of :func:`dpo_kernels.eager.tree_attention` that change the mask or the scores."""

    scale: float
    window: int | None
    softcap: float | None


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, tree: Tree, options: Options
    ) -> Tensor:
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        n_q, heads, _ = query.shape
        out = query.new_empty(n_q, heads, value.shape[-1])
        lse = query.new_empty(heads, n_q, dtype=torch.float32)  # divided by ln 2
        launch = _Launch(query, key, value, out, tree, options)
        if n_q:
            shares = lse if sinks is None else sinks.float() / LN_2.value
            _forward[(len(launch.tiles.by_query.order), heads)](
                query, key, value, out, lse, shares, *launch.arguments(), **launch.constants, SINKS=sinks is not None,
                num_stages=launch.blocks.stages,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.tree, ctx.options = tree, options
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, sinks = ctx.saved_tensors
        d_out = d_out.contiguous()  # the kernels use the strides of `out`, which is contiguous
        d_query, d_key, d_value = (query.new_empty(tensor.shape) for tensor in (query, key, value))
        delta = torch.empty_like(lse)
        launch = _Launch(query, key, value, out, ctx.tree, ctx.options)
        if len(query):
            _backward_query[(len(launch.tiles.by_query.order), query.shape[1])](
                query, key, value, out, lse, d_out, delta, d_query,
                *launch.arguments(), **launch.constants, num_stages=launch.blocks.stages,
            )  # fmt: skip
        _backward_key[(len(launch.tiles.by_key.order), key.shape[1])](
            query, key, value, lse, d_out, delta, d_key, d_value,
            *launch.arguments(by_key=True), **launch.constants, num_stages=launch.blocks.key_stages,
        )  # fmt: skip
        d_sinks = None if sinks is None else sink_gradient(sinks, lse * LN_2.value, delta)
        return d_query, d_key, d_value, d_sinks, None, None


class _Launch:
    """The arguments that the three kernels share. These do not include the input and output tensors."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, tree: Tree, options: Options):
        d, d_v = query.shape[-1], value.shape[-1]
        scale, window, softcap = options
        # tl.dot needs at least 16 columns.
        padded, value_padded = (max(16, triton.next_power_of_2(width)) for width in (d, d_v))
        if query.is_cuda:
            generation = torch.cuda.get_device_capability(query.device)[0]
            extended = window is not None or softcap is not None
            self.blocks = blocks_for(max(padded, value_padded), query.dtype, generation, extended)
        else:
            self.blocks = INTERPRETED
        self.tiles: TileMap = tree.prepared(
            ("tiles", self.blocks.queries, self.blocks.keys, query.device, window),
            lambda: tile_map(tree, self.blocks, query.device, window),
        )
        strides = [stride for tensor in (query, key, value, out) for stride in tensor.stride()[:2]]
        factors = (window or 0, scale / LN_2.value, (softcap or 0.0) / LN_2.value)
        self.sizes = (query.shape[0], key.shape[0], *factors, *strides)
        self.constants = {
            "GROUP": query.shape[1] // key.shape[1],
            "D": d,
            "D_PADDED": padded,
            "V": d_v,
            "V_PADDED": value_padded,
            "QUERIES": self.blocks.queries,
            "KEYS": self.blocks.keys,
            "WINDOWED": window is not None,
            "CAPPED": softcap is not None,
            "num_warps": self.blocks.warps,
        }

    def arguments(self, by_key: bool = False) -> tuple[Any, ...]:
        """Return mask, positions, tile lists (per block of queries or of keys), sizes, score options and strides."""
        tiles, lists = self.tiles, self.tiles.by_key if by_key else self.tiles.by_query
        places = (tiles.first, tiles.stop) if tiles.queries_at is None else (tiles.queries_at, tiles.keys_at)
        return tiles.first, tiles.stop, *places, *lists, *self.sizes


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Like :func:`dpo_kernels.eager.tree_attention`, with sums in fp32. Raises ``ValueError`` for fp64."""
    if query.dtype == torch.float64:
        raise ValueError(
            "triton tree_attention: does not support fp64, because it sums in fp32; use the backend sdpa or eager"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = Options(scale, tree.effective(window), softcap)
    if query.is_cuda or query.dtype == torch.float32:
        return _TreeAttention.apply(query, key, value, sinks, tree, options)
    # This line is reached only under Triton's interpreter. The interpreter stores bf16 values as integers and would
    # multiply these integers.
    return _TreeAttention.apply(query.float(), key.float(), value.float(), sinks, tree, options).to(query.dtype)
