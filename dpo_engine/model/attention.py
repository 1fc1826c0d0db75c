"""Core attention with context parallelism (CP), for causal rows and for rows of token trees, on any device.

Problem. Attention is the only operation of a layer that mixes the columns (token positions) of a row, so it must
communicate if CP splits a row over ranks. The work for a column is proportional to the number of keys that it attends
to. If each rank had a contiguous slice of a causal row, the last rank would do nearly twice the average work. A row of
trees contains prompts, each followed by its responses. In such rows, attention is not simply causal: in ``[prompt |
chosen | rejected]``, the rejected response must not attend to the chosen one.

Solution. :func:`dpo_engine.batching.shares.share_columns` gives every rank the same number of columns and nearly the
same attention work. A causal row is cut into 2cp chunks, and rank r holds chunks r and 2cp-1-r. A row of trees is cut
into small blocks of columns. The blocks are assigned to ranks so that every rank has about the same number of visible
(query, key) pairs. With a 2048-token prompt, two 8192-token responses and CP 8, the ranks' work differs by less than
0.1 %; with the assignment for causal rows, the busiest rank would do 1.57 times the average work. Queries stay local.
Keys and values are all-gathered and put in the order of the row. For a causal row, each rank then needs two attention
calls, each over a prefix of the keys, so no mask is built. For a row of trees, each rank needs one ``tree_attention``
call, in which ``Tree.rows`` selects the local columns as queries. The backward pass reduce-scatters the gradients of
keys and values.

Sliding windows, soft caps and sinks. If a layer has a soft cap or sinks, or a window that is shorter than the row,
causal rows are computed as trees, each of a single segment. If the window is shorter than the row (or than the longest
path of the trees), each rank receives only the keys and values that its own queries see
(:mod:`dpo_engine.model.gather`).

Why not ring attention. If every rank has all keys, any attention pattern is possible, and the softmax of a query needs
no partial results from other ranks. Results in different layouts therefore differ by rounding only. In a layer
without a window, the communication is one all-gather and one reduce-scatter. With grouped-query attention, keys and
values are smaller than queries.

The table of segments of a row of trees is passed in Megatron's ``attention_mask`` argument, because Megatron passes
this argument unchanged to every layer and to activation recomputation.

Not covered. CP does not reduce the memory of keys and values: each rank allocates keys and values for the whole row,
also in layers with a window, where the columns that it does not receive are zero. The communication does not overlap
with computation. The work of the shares is balanced only in layers without a window. Attention dropout and batches of
several rows of trees are not supported. With Transformer Engine layers, causal rows of models without windows, soft
caps and sinks use Transformer Engine's own attention.
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
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.gather import GatherChunks, GatherColumns, GatherWindows, Windows
from dpo_kernels import Tree, tree_attention
from dpo_kernels.transfer import to_device


class TreeShare(NamedTuple):
    """One context-parallel rank's share of a row of trees.

    tree     segments of the whole row, and the columns of this rank as queries
    shares   the columns of each rank; together, they are all columns of the row
    rank     this rank's number in the context-parallel group
    """

    tree: Tree
    shares: list[np.ndarray]
    rank: int

    def gathering(self, device: torch.device) -> list[Tensor]:
        """Return each column's index in the concatenation of all shares, and this concatenation; both [n]."""

        def build() -> list[Tensor]:
            columns = np.concatenate(self.shares)
            return to_device([torch.from_numpy(order) for order in (np.argsort(columns), columns)], device)

        return self.tree.prepared(("gathering", device), build)

    def windows(self, window: int, device: torch.device) -> Windows:
        """Return the columns that this rank sends and receives in a layer with a sliding window."""

        def build() -> Windows:
            seen = [self.tree.select(share).reached(window) for share in self.shares]
            others = [rank for rank in range(len(self.shares)) if rank != self.rank]
            sent = {rank: np.flatnonzero(seen[rank][self.shares[self.rank]]) for rank in others}
            received = {rank: self.shares[rank][seen[self.rank][self.shares[rank]]] for rank in others}
            none = np.zeros(0, dtype=np.int64)
            lists = [[columns.get(rank, none) for rank in range(len(self.shares))] for columns in (sent, received)]
            arrays = [self.shares[self.rank], *lists[0], *lists[1]]
            own, *both = to_device([torch.from_numpy(array) for array in arrays], device)
            return Windows(self.tree.n, own, both[: len(self.shares)], both[len(self.shares) :])

        return self.tree.prepared(("windows", window, device), build)


@lru_cache(maxsize=512)
def _tree_share(segments: bytes, cp_rank: int, cp_size: int) -> TreeShare:
    """Return one rank's share of a row of trees. The result is cached, because every layer needs it.

    segments  bytes of the row's table of segments: lengths and parents, ``[2, k]`` int64
    """
    lengths, parents = np.frombuffer(segments, dtype=np.int64).reshape(2, -1)
    tree = Tree.of(lengths, parents)
    if cp_size == 1:
        return TreeShare(tree, [np.arange(tree.n)], 0)
    shares = share_columns(tree.n, cp_size, tree.positions)
    return TreeShare(tree.select(shares[cp_rank]), shares, cp_rank)


@lru_cache(maxsize=64)
def _row_share(length: int, cp_rank: int, cp_size: int) -> TreeShare:
    """Return one rank's share of a causal row, as a tree of one segment."""
    shares = [np.arange(length)] if cp_size == 1 else share_columns(length, cp_size)
    return TreeShare(Tree.of([length], [-1], shares[cp_rank]), shares, cp_rank)


@lru_cache(maxsize=64)
def _rows(length: int, rows: int, cp_rank: int, cp_size: int) -> Tree:
    """Return several causal rows as consecutive trees of one segment each. The queries are the columns of one rank."""
    own = _row_share(length, cp_rank, cp_size).tree.rows
    return Tree.of([length] * rows, [-1] * rows, np.concatenate([own + row * length for row in range(rows)]))


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
    """Return ``columns`` as a tensor on a device.

    columns  [q] int64, in host memory: the columns that the last layer computes
    """
    return columns if device.type == "cpu" else _indices_on(device, columns.numpy().tobytes())


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Compute causal attention for the last ``q`` of ``k`` positions; keys and values cover all ``k`` positions.

    query       [q, b, n, d]
    key, value  [k, b, n_kv, d] and [k, b, n_kv, d_v], k >= q, n a multiple of n_kv
    Returns     [q, b, n, d_v]
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


def attention_options(arch: Architecture, length: int) -> list[str]:
    """Return the options of ``tree_attention`` that at least one layer needs in rows of at most ``length`` tokens."""
    windowed = arch.has_windows and length > arch.sliding_window
    needed = {"window": windowed, "softcap": arch.attention_softcap is not None, "sinks": arch.attention_sinks}
    return [name for name, needs in needed.items() if needs]


class CoreAttention(nn.Module):
    """The module that Megatron's SelfAttention calls between its projections, with Megatron's constructor arguments.

    *Collectives* over the context-parallel group, if it has more than one rank: an all-gather of keys and values
    ``[s/cp, b, n_kv/t, d + d_v]`` in the forward pass, and a reduce-scatter of their gradients in the backward pass. If
    the layer has a window that is shorter than the row, or than the longest path of the row's trees, each pass has an
    all-to-all of some columns instead.
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
        self.window = config.arch.window(layer_number - 1)
        self.softcap = config.arch.attention_softcap

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        columns: Tensor | None = None,
        sinks: Tensor | None = None,
        **megatron: Any,
    ) -> Tensor:
        """Compute attention of this rank's queries over the whole row.

        query           [s/cp, b, n/t, d], or [q, b, n/t, d] with ``columns``
        key, value      [s/cp, b, n_kv/t, d] and [s/cp, b, n_kv/t, d_v]. The size d_v of value heads can differ from the
                        size d of query and key heads
        attention_mask  [2, k] int64, in host memory: lengths and parents of the segments of a row of trees (b is 1), or
                        None for causal rows. This is not a mask; we use this argument because Megatron passes it
                        unchanged to every layer and to recomputation
        columns         [q] int64, in host memory, only for trees: the columns of the queries, as ascending indices into
                        this rank's share of the row; None if there is a query for every column
        sinks           [n/t]  score of each head's additional key, whose value vector is zero; None: there are no such
                        keys
        Returns         [s/cp, b, n/t * d_v], or [q, b, n/t * d_v] with ``columns``
        """
        cp, rank = self.group.size(), self.group.rank()
        # `value` is a view of the output of the fused projection. Attention saves its inputs for the backward pass;
        # a saved view would keep the whole output of the projection in memory.
        value = value.contiguous()
        if attention_mask is not None:
            segments = attention_mask.numpy().tobytes()
            share = _tree_share(segments, rank, cp)
            query, key, value = query[:, 0], key[:, 0], value[:, 0]
            options = self._options(share.tree, sinks)
            if cp > 1:
                sizes = [key.shape[-1], value.shape[-1]]
                both = torch.cat([key, value], dim=-1)
                if "window" in options:
                    windows = share.windows(self.window, query.device)
                    both = GatherWindows.apply(both, windows, self.group)
                else:
                    both = GatherColumns.apply(both, *share.gathering(query.device), self.group)
                key, value = both.split(sizes, dim=-1)
            tree = share.tree if columns is None else _selected_tree(segments, columns.numpy().tobytes(), rank, cp)
            return tree_attention(query, key, value, tree, self.scale, **options).flatten(1)[:, None]
        if self.window is not None or self.softcap is not None or sinks is not None:
            share = _row_share(len(query) * cp, rank, cp)
            if options := self._options(share.tree, sinks):
                return self._special_rows(query, key, value, share, options)
        if cp == 1:
            return causal(query, key, value, self.scale).flatten(2)
        gathered = GatherChunks.apply(torch.cat([key, value], dim=-1), self.group)
        key, value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)  # [s, b, n_kv/t, d]
        size = query.shape[0] // 2
        parts = []
        for half, chunk in zip(query.split(size), (rank, 2 * cp - 1 - rank), strict=True):
            seen = (chunk + 1) * size
            parts.append(causal(half, key[:seen], value[:seen], self.scale))
        return torch.cat(parts).flatten(2)

    def _options(self, tree: Tree, sinks: Tensor | None) -> dict[str, Any]:
        """Return the options of ``tree_attention`` that have an effect.

        Options without an effect are left out, because a backend may not support them.
        """
        options = {"window": tree.effective(self.window), "softcap": self.softcap, "sinks": sinks}
        return {name: value for name, value in options.items() if value is not None}

    def _special_rows(
        self, query: Tensor, key: Tensor, value: Tensor, share: TreeShare, options: dict[str, Any]
    ) -> Tensor:
        """Compute attention in causal rows with a window, a soft cap or sinks; shapes as for :meth:`forward`."""
        cp, rank = self.group.size(), self.group.rank()
        if cp > 1:
            sizes, both = [key.shape[-1], value.shape[-1]], torch.cat([key, value], dim=-1)
            if "window" in options:
                gathered = GatherWindows.apply(both, share.windows(self.window, query.device), self.group)
            else:
                gathered = GatherChunks.apply(both, self.group)
            key, value = gathered.split(sizes, dim=-1)
        tree = _rows(share.tree.n, query.shape[1], rank, cp)
        flat = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        out = tree_attention(*flat, tree, self.scale, **options)
        return out.flatten(1).unflatten(0, (query.shape[1], -1)).transpose(0, 1)
