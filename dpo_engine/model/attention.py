"""Core attention for any device, over one context-parallel rank's share of the rows: causal rows, or one row of trees.

Context parallelism deals the columns as :func:`dpo_engine.batching.shares.share_columns` says, so that all ranks see
about the same number of (query, key) pairs. Keys and values are gathered; queries stay where they are.
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


class _GatherChunks(torch.autograd.Function):
    """All-gather along the sequence axis into natural order; the backward pass reduce-scatters.

    Written as one function because ``torch.distributed.nn``'s gathers fail in the backward pass on gloo subgroups.
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
        by_rank = torch.stack([chunks[:size], chunks[size:].flip(0)], dim=1).flatten(0, 2)  # [s, ...] rank after rank
        local = by_rank.new_empty((by_rank.shape[0] // size, *by_rank.shape[1:]))
        dist.reduce_scatter_tensor(local, by_rank.contiguous(), group=ctx.group)
        return local, None


class _GatherColumns(torch.autograd.Function):
    """As :class:`_GatherChunks`, for columns dealt in any equal parts."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(order)
        gathered = local.new_empty((group.size() * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        by_rank = torch.empty_like(grad)
        by_rank[order] = grad
        local = by_rank.new_empty((by_rank.shape[0] // ctx.group.size(), *by_rank.shape[1:]))
        dist.reduce_scatter_tensor(local, by_rank, group=ctx.group)
        return local, None, None


class TreeShare(NamedTuple):
    """One context-parallel rank's part of a row of trees.

    tree    the segments, with this rank's columns as queries
    order   [n]  where each column of the row lies in all ranks' parts one after the other
    """

    tree: Tree
    order: np.ndarray


@lru_cache(maxsize=512)
def _tree_share(segments: bytes, cp_rank: int, cp_size: int) -> TreeShare:
    """The part of a row whose segments are ``[2, k]`` int64; kept, because every layer asks for it."""
    lengths, parents = np.frombuffer(segments, dtype=np.int64).reshape(2, -1)
    if cp_size == 1:
        return TreeShare(Tree.of(lengths, parents), np.arange(lengths.sum()))
    shares = share_columns(int(lengths.sum()), cp_size, segment_positions(lengths, parents))
    return TreeShare(Tree.of(lengths, parents, shares[cp_rank]), np.argsort(np.concatenate(shares)))


def segment_positions(lengths: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Position of each token of a row of trees [n]: a segment goes on where its parent ends."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    for segment, parent in enumerate(parents):
        starts[segment] = starts[parent] + lengths[parent] if parent >= 0 else 0
    return np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)])


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of the last ``q`` positions over ``k`` of them.

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
    """What Megatron's SelfAttention calls between its projections; the constructor takes Megatron's arguments.

    *Collectives* over the context-parallel group when it has more than one rank: forward all-gather of keys and values
    ``[2, s/cp, b, n_kv/t, d]``, backward reduce-scatter of the same.
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
        """Attention of this rank's queries over the whole row.

        query           [s/cp, b, n/t, d]     key, value  [s/cp, b, n_kv/t, d]
        attention_mask  [2, k] int64, in host memory: lengths and parents of the segments of a row of trees, then b is
                        1; none for causal rows. Not a mask: Megatron hands what stands in this place to each layer, and
                        to recomputation
        columns         [q] int64, in host memory: those of this rank's share, ascending, that the queries are of; none:
                        all
        Returns         [s/cp, b, n/t * d]
        """
        cp, rank = self.group.size(), self.group.rank()
        if attention_mask is not None:
            share = _tree_share(attention_mask.numpy().tobytes(), rank, cp)
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            if cp > 1:
                order = share.tree.prepared(
                    ("order", query.device), lambda: torch.from_numpy(share.order).to(query.device)
                )
                key, value = _GatherColumns.apply(torch.stack([key, value], dim=1), order, self.group).unbind(1)
            tree = share.tree if columns is None else share.tree.select(share.tree.rows[columns.numpy()])
            return tree_attention(query, key, value, tree, self.scale).flatten(1)[:, None]
        if cp == 1:
            return causal(query, key, value, self.scale).flatten(2)
        gathered = _GatherChunks.apply(torch.stack([key, value], dim=1), self.group)
        key, value = gathered[:, 0], gathered[:, 1]  # [s, b, n_kv/t, d]
        size = query.shape[0] // 2
        parts = []
        for half, chunk in zip(query.split(size), (rank, 2 * cp - 1 - rank), strict=True):
            seen = (chunk + 1) * size
            parts.append(causal(half, key[:seen], value[:seen], self.scale))
        return torch.cat(parts).flatten(2)
