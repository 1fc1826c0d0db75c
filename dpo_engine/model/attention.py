"""Core attention with context parallelism (CP), for causal rows and for rows of token trees, on any device.

Problem. Attention is the only operation of a layer that mixes the columns (token positions) of a row, so it must
communicate if CP splits a row over ranks. The work for a column is proportional to the number of keys that it attends
to. If each rank had a contiguous slice of a causal row, the last rank would do nearly twice the average work. Trees
have irregular attention patterns as well: in ``[prompt | chosen | rejected]``, the rejected response must not attend to
the chosen one.

Solution. :func:`dpo_engine.batching.shares.share_columns` gives every rank the same number of columns and nearly the
same attention work. A causal row is cut into 2cp chunks, and rank r holds chunks r and 2cp-1-r. A row of trees is cut
into small blocks of columns, which are assigned to ranks so that each rank attends to about the same number of keys.
With a 2048-token prompt, two 8192-token responses and CP 8, the ranks' work differs by less than 0.1 %; with the
assignment for causal rows, the busiest rank would do 1.57 times the average work. Queries stay local. Keys and values
are all-gathered and put in the order of the row. A causal row then needs two attention calls, each over a prefix of the
keys, so no mask is built. A row of trees needs one ``tree_attention`` call, in which ``Tree.rows`` selects the local
columns as queries. The backward pass reduce-scatters the gradients of keys and values.

Why not ring attention. If every rank has all keys, any attention pattern is possible, and the softmax of a query needs
no partial results from other ranks. Results in different layouts therefore differ by rounding only. The communication
is one all-gather and one reduce-scatter per layer, and with grouped-query attention keys and values are smaller than
queries.

The table of segments of a row of trees is passed in Megatron's ``attention_mask`` argument, because Megatron passes
this argument unchanged to every layer and to activation recomputation.

Not covered. Each rank holds the keys and values of the whole row, so CP does not reduce their memory, and the
all-gather does not overlap with computation. Sliding windows (``data.max_length`` must not exceed the window),
attention dropout, and batches of several rows of trees are not supported. With Transformer Engine layers, causal rows
use Transformer Engine's own attention.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from dpo_engine.batching.shares import share_columns
from dpo_kernels import Tree, tree_attention
from dpo_kernels.transfer import to_device


class _GatherChunks(torch.autograd.Function):
    """All-gather the chunks of a causal row along the sequence axis, in row order; the backward pass reduce-scatters.

    We need our own function, because the backward pass of ``torch.distributed.nn``'s gathers fails on gloo subgroups.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        size = group.size()
        gathered = local.new_empty((size * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        halves = gathered.unflatten(0, (size, 2, -1))  # [cp, 2, s/2cp, ...]: rank r's chunks r and 2cp-1-r
        return torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1)  # [s, ...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        chunks = grad.unflatten(0, (2 * size, -1))
        by_rank = torch.stack([chunks[:size], chunks[size:].flip(0)], dim=1).flatten(0, 2)  # [s, ...] ordered by rank
        local = by_rank.new_empty((by_rank.shape[0] // size, *by_rank.shape[1:]))
        dist.reduce_scatter_tensor(local, by_rank.contiguous(), group=ctx.group)
        return local, None


class _GatherColumns(torch.autograd.Function):
    """Like :class:`_GatherChunks`, but for any assignment that gives all ranks the same number of columns."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, order: Tensor, inverse: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(inverse)
        gathered = local.new_empty((group.size() * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        by_rank = grad[inverse]
        local = by_rank.new_empty((by_rank.shape[0] // ctx.group.size(), *by_rank.shape[1:]))
        dist.reduce_scatter_tensor(local, by_rank, group=ctx.group)
        return local, None, None, None


class TreeShare(NamedTuple):
    """One context-parallel rank's share of a row of trees.

    tree     segments of the whole row, and the columns of this rank as queries
    columns  [n]  columns of the row in the order of the concatenated shares of all ranks
    """

    tree: Tree
    columns: np.ndarray

    def gathering(self, device: torch.device) -> list[Tensor]:
        """Return, on a device, the index in ``columns`` of each column of the row, and ``columns`` itself; both [n]."""
        both = (np.argsort(self.columns), self.columns)
        return self.tree.prepared(
            ("gathering", device), lambda: to_device([torch.from_numpy(order) for order in both], device)
        )


@lru_cache(maxsize=512)
def _tree_share(segments: bytes, cp_rank: int, cp_size: int) -> TreeShare:
    """Return one rank's share of a row of trees. The result is cached, because every layer needs it.

    segments  bytes of the row's table of segments: lengths and parents, ``[2, k]`` int64
    """
    lengths, parents = np.frombuffer(segments, dtype=np.int64).reshape(2, -1)
    if cp_size == 1:
        return TreeShare(Tree.of(lengths, parents), np.arange(lengths.sum()))
    shares = share_columns(int(lengths.sum()), cp_size, segment_positions(lengths, parents))
    return TreeShare(Tree.of(lengths, parents, shares[cp_rank]), np.concatenate(shares))


@lru_cache(maxsize=512)
def _selected_tree(segments: bytes, columns: bytes, cp_rank: int, cp_size: int) -> Tree:
    """Return the tree of :func:`_tree_share` with only some of the rank's columns as queries.

    columns  bytes of ascending indices into the rank's share, ``[q]`` int64
    """
    tree = _tree_share(segments, cp_rank, cp_size).tree
    return tree.select(tree.rows[np.frombuffer(columns, dtype=np.int64)])


@lru_cache(maxsize=512)
def _indices_on(device: torch.device, columns: bytes) -> Tensor:
    return to_device([torch.frombuffer(bytearray(columns), dtype=torch.int64)], device)[0]


def indices_on(device: torch.device, columns: Tensor) -> Tensor:
    """Return the columns that the last layer computes, [q] int64 in host memory, as a tensor on a device."""
    return columns if device.type == "cpu" else _indices_on(device, columns.numpy().tobytes())


def segment_positions(lengths: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Return the position of each token in a row of trees [n]; a segment's positions continue those of its parent."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    for segment, parent in enumerate(parents):
        starts[segment] = starts[parent] + lengths[parent] if parent >= 0 else 0
    return np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)])


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Compute causal attention for the last ``q`` of ``k`` positions; keys and values cover all ``k`` positions.

    query       [q, b, n, d]       key, value  [k, b, n_kv, d], k >= q, n a multiple of n_kv
    Returns     [q, b, n, d]
    """
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    square = q.shape[2] == k.shape[2]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if square else causal_lower_right(q.shape[2], k.shape[2]),
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3)


class CoreAttention(nn.Module):
    """The module that Megatron's SelfAttention calls between its projections, with Megatron's constructor arguments.

    *Collectives* over the context-parallel group, if it has more than one rank: in the forward pass an all-gather of
    keys and values ``[2, s/cp, b, n_kv/t, d]``, in the backward pass a reduce-scatter of their gradients.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **megatron: Any,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        columns: Tensor | None = None,
        **megatron: Any,
    ) -> Tensor:
        """Compute attention of this rank's queries over the whole row.

        query           [s/cp, b, n/t, d], or [q, b, n/t, d] with ``columns``     key, value  [s/cp, b, n_kv/t, d].
                        Heads of values may have another size than those of queries and keys
        attention_mask  [2, k] int64, in host memory: lengths and parents of the segments of a row of trees (b is 1), or
                        None for causal rows. This is not a mask; we use this argument because Megatron passes it
                        unchanged to every layer and to recomputation
        columns         [q] int64, in host memory, only for trees: the columns of the queries, as ascending indices into
                        this rank's share of the row; None if there is a query for every column
        Returns         [s/cp, b, n/t * d], or [q, b, n/t * d]
        """
        cp, rank = self.group.size(), self.group.rank()
        # `value` is a view of the product of queries, keys and values. Attention saves its inputs for the backward
        # pass, and a view would keep the whole product in memory.
        value = value.contiguous()
        if attention_mask is not None:
            segments = attention_mask.numpy().tobytes()
            share = _tree_share(segments, rank, cp)
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            if cp > 1:
                sizes = [key.shape[-1], value.shape[-1]]
                both = torch.cat([key, value], dim=-1)
                both = _GatherColumns.apply(both, *share.gathering(query.device), self.group)
                key, value = both.split(sizes, dim=-1)
            tree = share.tree if columns is None else _selected_tree(segments, columns.numpy().tobytes(), rank, cp)
            return tree_attention(query, key, value, tree, self.scale).flatten(1)[:, None]
        if cp == 1:
            return causal(query, key, value, self.scale).flatten(2)
        gathered = _GatherChunks.apply(torch.cat([key, value], dim=-1), self.group)
        key, value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)  # [s, b, n_kv/t, d]
        size = query.shape[0] // 2
        parts = []
        for half, chunk in zip(query.split(size), (rank, 2 * cp - 1 - rank), strict=True):
            seen = (chunk + 1) * size
            parts.append(causal(half, key[:seen], value[:seen], self.scale))
        return torch.cat(parts).flatten(2)
