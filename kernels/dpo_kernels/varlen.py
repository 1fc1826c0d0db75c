"""Tree attention as one call of flash attention for causal rows of different lengths (its "varlen" form).

Problem. A kernel of our own for trees must be tuned for every generation of GPUs. Flash attention is tuned already, but
its mask is causal: the last query of a row sees all keys, and each earlier query sees one key fewer than the next
query.

Solution. Queries that follow each other on a path of a tree form a run: each query sees all keys that the previous
query sees, and its own key. A run is therefore a causal row, if the keys that its last query sees are copied next to
each other. All runs of all trees of a micro-batch are computed by one call. The backward pass adds the gradients of a
key's copies in a fixed order and in fp32, without atomics, so this sum does not change from call to call.

Why this way. Copies of keys and values are small if several query heads share a key head. If every token is a query,
only tokens on several paths are copied more than once; the prompt of a pair is copied twice. Any subset of a row's
tokens can be queries, so context parallelism, and a last layer that computes only some tokens, need no special code.
However, each run of a subset needs its own copy of the keys that its queries see.

With a window, a run has only the keys that at least one of its queries sees. Sinks are added afterwards: a sink scales
a query's output by 1 / (1 + exp(sink - lse)). With this output, and a log-sum-exp that includes the sink, flash
attention's backward pass returns the gradients of queries, keys and values.

Not covered. Flash attention does not support soft caps. On a GPU, it needs 16-bit operands and heads of at most 256
dimensions. On a CPU, each run is computed by a separate call. This is slower than ``sdpa``, and is meant only for tests
on machines without a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import eager
from dpo_kernels.tile_attention import sink_gradient, tile_attention
from dpo_kernels.transfer import to_device
from dpo_kernels.tree import Tree

WIDEST_HEAD = 256


class Runs(NamedTuple):
    """The runs of queries of a tree, and the keys of each run.

    keys             [k]         token of each copied key, run after run
    query_ends       [runs + 1]  offset of each run's first query, and the total number of queries
    key_ends         [runs + 1]  offset of each run's first key, and k
    """

    keys: np.ndarray
    query_ends: np.ndarray
    key_ends: np.ndarray


class Copies(NamedTuple):
    """The runs of a tree as tensors on a device.

    keys                  [k]         int64, as in :class:`Runs`
    by_token              [k]         int64, indices of the copies, sorted by token
    bounds                [n + 1]     int64, offset of each token's first copy in ``by_token``, and k
    query_ends, key_ends  [runs + 1]  int32, as in :class:`Runs`
    queries, seen                     largest number of queries and of keys in a run
    """

    keys: Tensor
    by_token: Tensor
    bounds: Tensor
    query_ends: Tensor
    key_ends: Tensor
    queries: int
    seen: int


def runs_of(tree: Tree, window: int | None = None) -> Runs:
    """Split the queries of a tree into runs. The tree must have at least one query.

    window  as in :func:`dpo_kernels.eager.tree_attention`

    >>> pair = Tree.of(lengths=[2, 2, 1], parents=[-1, 0, 0])  # prompt, chosen, rejected
    >>> runs_of(pair)
    Runs(keys=array([0, 1, 2, 3, 0, 1, 4]), query_ends=array([0, 4, 5]), key_ends=array([0, 4, 7]))
    >>> runs_of(pair, window=2)
    Runs(keys=array([0, 1, 2, 3, 1, 4]), query_ends=array([0, 4, 5]), key_ends=array([0, 4, 6]))
    """
    rows, starts, ends = tree.rows, tree.starts, tree.starts + tree.lengths
    paths: list[np.ndarray] = []  # the tokens that a segment's first token sees, besides itself
    for parent in tree.parents.tolist():
        above = np.arange(starts[parent], ends[parent]) if parent >= 0 else np.arange(0)
        paths.append(np.concatenate([paths[parent], above]) if parent >= 0 else above)
    segments = np.searchsorted(ends, rows, side="right")
    # A query continues the previous query's run if its token directly follows the previous query's token in the row,
    # and belongs to the same segment or to the first child of that segment.
    goes_on = np.diff(segments) == 0
    goes_on |= tree.parents[segments[1:]] == segments[:-1]
    firsts = np.flatnonzero(np.concatenate([[True], (np.diff(rows) != 1) | ~goes_on]))
    counts = np.diff(firsts, append=len(rows))
    keys = []
    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        segment = segments[first]
        path = np.concatenate([paths[segment], np.arange(starts[segment], rows[first] + count)])
        keys.append(path if window is None else path[-(count + window - 1) :])
    return Runs(np.concatenate(keys), _ends(counts), _ends([len(seen) for seen in keys]))


def _ends(sizes: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def copies_of(tree: Tree, device: torch.device, window: int | None) -> Copies:
    """Return the runs of a tree on a device; ``window`` as for :func:`runs_of`."""
    runs = runs_of(tree, window)
    by_token = np.argsort(runs.keys, kind="stable")
    bounds = _ends(np.bincount(runs.keys, minlength=tree.n))
    ends = (ends.astype(np.int32) for ends in (runs.query_ends, runs.key_ends))
    tensors = to_device([torch.from_numpy(array) for array in (runs.keys, by_token, bounds, *ends)], device)
    return Copies(*tensors, int(np.diff(runs.query_ends).max()), int(np.diff(runs.key_ends).max()))


class _Copied(torch.autograd.Function):
    """Copy tokens into the order of ``Copies.keys``. The backward pass sums the gradients of a token's copies."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return tensor[copies.keys]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sorted_copies = grad[ctx.copies.by_token].flatten(1).to(torch.promote_types(grad.dtype, torch.float32))
        total = torch.segment_reduce(sorted_copies, "sum", offsets=ctx.copies.bounds, initial=0.0)
        return total.to(grad.dtype).view(-1, *grad.shape[1:]), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, copies: Copies, scale: float, window: int | None, **options: Any
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    ends = (copies.query_ends, copies.key_ends, copies.queries, copies.seen)
    return varlen_attn(query, key, value, *ends, scale=scale, window_size=_window_size(window), **_GROUPED, **options)


def _flash_with_lse(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Compute attention without sinks. Return the output and the log-sum-exp of each query's scores [heads, n_q]."""
    from torch.nn.attention.varlen import AuxRequest

    return _flash(*inputs, return_aux=AuxRequest(lse=True))


def _flash_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    copies: Copies,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ends = (copies.query_ends, copies.key_ends, copies.queries, copies.seen)
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # random state of dropout
    return torch.ops.torch_attn._varlen_attn_backward(
        d_out.contiguous(), query, key, value, out, lse, *ends, window is None, unused, scale,
        list(_window_size(window)),
    )  # fmt: skip


def _window_size(window: int | None) -> tuple[int, int]:
    """Return flash attention's window: how many tokens a query sees before itself and after itself; -1: no limit."""
    return (-1 if window is None else window - 1, 0)


class _FlashWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        copies: Copies,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out, lse = _flash_with_lse(query, key, value, copies, scale, window)
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = (out * (lse - total).exp().T[..., None]).to(out.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.options = (copies, scale, window)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        grads = _flash_backward(d_out, query, key, value, out, total, *ctx.options)
        delta = (out.to(total.dtype) * d_out.to(total.dtype)).sum(dim=-1).T
        return *grads, sink_gradient(sinks, total, delta), None, None, None


def _causal_rows(
    query: Tensor, key: Tensor, value: Tensor, copies: Copies, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Compute causal attention for each run: its last query sees all keys of the run, or all keys in the window."""
    if query.is_cuda:
        if sinks is not None:
            return _FlashWithSinks.apply(query, key, value, sinks, copies, scale, window)
        return _flash(query, key, value, copies, scale, window)
    outputs = []
    sizes = copies.query_ends.diff().tolist(), copies.key_ends.diff().tolist()
    parts = (query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]))
    for run in zip(*parts, strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in run)
        count, seen = q.shape[2], k.shape[2]
        visible = torch.ones(count, seen, dtype=torch.bool).tril(seen - count)
        if window is not None:
            visible = visible.triu(seen - count - window + 1)
        if sinks is not None:
            outputs.append(tile_attention(*run, visible, scale, None, sinks))
            continue
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


# torch 2.12 added an argument for query heads that share a key head; 2.11 accepts such heads without this argument.
_GROUPED = {"enable_gqa": True} if torch.torch_version.TorchVersion(torch.__version__) >= (2, 12) else {}


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
    """Like :func:`dpo_kernels.eager.tree_attention`.

    Raises ``ValueError`` for a soft cap, and on a GPU for operands that flash attention does not support.
    """
    if softcap is not None:
        raise ValueError(
            "varlen tree_attention: flash attention does not support a soft cap on attention scores; use the backend "
            "triton or sdpa"
        )
    width = max(query.shape[-1], value.shape[-1])
    if query.is_cuda and (query.element_size() != 2 or width > WIDEST_HEAD):
        raise ValueError(
            f"varlen tree_attention: flash attention needs 16-bit operands and heads of at most {WIDEST_HEAD} "
            f"dimensions; here, the dtype is {query.dtype} and the head size is {width}; use the backend sdpa"
        )
    return attention_in_runs(partial(_causal_rows, sinks=sinks), query, key, value, tree, scale, window, sinks)


def attention_in_runs(
    causal_rows: Callable[[Tensor, Tensor, Tensor, Copies, float, int | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute tree attention with a function for causal rows of different lengths.

    The other arguments are those of :func:`tree_attention`. The caller's ``causal_rows`` must apply the sinks. If there
    are no queries, ``causal_rows`` is not called. Only in this case, this function uses the argument ``sinks``, so that
    the sinks are still part of the autograd graph.

    causal_rows  called with the queries [n_q, heads, d], the copied keys and values [k, kv_heads, d] of the runs, the
                 :class:`Copies`, the scale and the window. All heads have the same size d. Returns [n_q, heads, d]
    """
    if not len(tree.rows):
        # The result is empty, but must be part of the autograd graph.
        return eager.tree_attention(query, key, value, tree, scale, window=window, sinks=sinks)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    value_width = value.shape[-1]
    width = max(query.shape[-1], value_width)
    # Flash attention needs equal head dimensions for keys and values. Padding with zeros does not change the result.
    query, key, value = (
        tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))
        for tensor in (query, key, value)
    )
    window = tree.effective(window)
    copies = tree.prepared(("copies", query.device, window), lambda: copies_of(tree, query.device, window))
    keys, values = _Copied.apply(key, copies), _Copied.apply(value, copies)
    return causal_rows(query, keys, values, copies, scale, window)[..., :value_width]
