"""Communication of keys and values over context-parallel ranks, each of which has some of the columns of every row.

A column is the index of a token in its row. Layers without a sliding window gather all columns. A layer with a window
sends only the columns that the receiver's queries see. In a causal row, a rank has two chunks of consecutive columns,
and receives the columns just before these chunks. In the gathered row, columns that a rank neither has nor receives are
0; none of its queries attends to them.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class GatherChunks(torch.autograd.Function):
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


class GatherColumns(torch.autograd.Function):
    """Like :class:`GatherChunks`, but for any assignment of columns that gives all ranks the same number of columns."""

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


class Windows(NamedTuple):
    """Columns that one rank sends and receives in a layer with a sliding window; all tensors are int64, on the device.

    length   number of columns of the whole row
    own      [s/cp]  columns of this rank
    sent     one tensor per rank: the columns that go to that rank, as indices into ``own``
    received one tensor per rank: the columns of the row that come from that rank
    """

    length: int
    own: Tensor
    sent: list[Tensor]
    received: list[Tensor]


class GatherWindows(torch.autograd.Function):
    """Like :class:`GatherColumns`, but only for the columns that the queries of this rank see in a sliding window.

    *Collectives*: all-to-all, forward and backward. The backward pass adds the other ranks' gradients in rank order.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, windows: Windows, group: dist.ProcessGroup) -> Tensor:
        ctx.windows, ctx.group = windows, group
        sent = local[torch.cat(windows.sent)]
        received = _exchange(sent, windows.sent, windows.received, group)
        row = local.new_zeros(windows.length, *local.shape[1:])
        row[windows.own] = local
        row[torch.cat(windows.received)] = received
        return row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        windows: Windows = ctx.windows
        back = _exchange(grad[torch.cat(windows.received)], windows.received, windows.sent, ctx.group)
        local = grad[windows.own]
        for columns, part in zip(windows.sent, back.split([len(columns) for columns in windows.sent]), strict=True):
            local[columns] += part
        return local, None, None


def _exchange(values: Tensor, sent: list[Tensor], received: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    into, out_of = [len(columns) for columns in received], [len(columns) for columns in sent]
    found = values.new_empty(sum(into), *values.shape[1:])
    dist.all_to_all_single(found, values, into, out_of, group=group)
    return found
