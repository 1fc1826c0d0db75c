"""Attention of a few queries, with a soft cap on the scores and with sinks.

torch's ``scaled_dot_product_attention`` supports neither of these two options.

The scores of one call exist in memory during the forward pass, and again during the backward pass, which recomputes
them. Between the passes, only inputs, outputs and the log-sum-exp of each query are kept.
"""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels.products import wide


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention over the keys that a mask allows. Sums are in fp32, or in fp64 for fp64 operands.

    query       [q, heads, d]                 key [k, kv_heads, d]          value [k, kv_heads, d_v]
    mask        [q, k]  boolean, true if the query sees the key; or numbers to add to the scores. Every query must see
                at least one key
    scale, softcap, sinks   as in :func:`dpo_kernels.eager.tree_attention`

    Returns     [q, heads, d_v]  in the dtype of ``query``
    """
    return _TileAttention.apply(query, key, value, mask, scale, softcap, sinks)


def _by_key_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """Turn [n, heads, d] into [kv_heads, heads / kv_heads, n, d], in the dtype that :func:`wide` gives."""
    return tensor.to(wide(tensor.dtype)).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _by_token(tensor: Tensor) -> Tensor:
    """Turn [kv_heads, group, n, d] into [n, heads, d]."""
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(query: Tensor, key: Tensor, mask: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Any]:
    """Return the scores (-inf for masked keys), and the soft cap's derivative (None without a soft cap)."""
    scores = (query @ key.mT).mul_(scale)  # [kv_heads, group, q, k]
    slope = None
    if softcap is not None:  # cap the scores before masking them, because the soft cap would make -inf finite
        scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(softcap)
    if mask.dtype is torch.bool:
        return scores.masked_fill_(~mask, -torch.inf), slope
    return scores.add_(mask), slope


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        q, k, v = (_by_key_head(tensor, key.shape[1]) for tensor in (query, key, value))
        scores, _ = _scores(q, k, mask, scale, softcap)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(*lse.shape[:2], 1, 1))
        out = _by_token(scores.sub_(lse).exp_() @ v).to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, sinks, out, lse)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks, out, lse = ctx.saved_tensors
        q, k, v, o, d_o = (_by_key_head(tensor, key.shape[1]) for tensor in (query, key, value, out, d_out))
        scores, slope = _scores(q, k, mask, ctx.scale, ctx.softcap)
        weights = scores.sub_(lse).exp_()
        delta = (o * d_o).sum(dim=-1, keepdim=True)
        d_scores = (d_o @ v.mT).sub_(delta).mul_(weights)
        if slope is not None:
            d_scores.mul_(slope)
        d_key = (d_scores.mT @ q).mul_(ctx.scale).sum(dim=1, keepdim=True)
        d_value = (weights.mT @ d_o).sum(dim=1, keepdim=True)
        d_sinks = (
            None if sinks is None else sink_gradient(sinks, lse[..., 0].flatten(0, 1), delta[..., 0].flatten(0, 1))
        )
        d_query = _by_token(d_scores @ k).mul_(ctx.scale).to(query.dtype)
        return d_query, _by_token(d_key).to(key.dtype), _by_token(d_value).to(value.dtype), None, None, None, d_sinks


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of the sinks [heads]. A sink has no value vector, so it only reduces the weights of the keys.

    lse     [heads, n_q]  log-sum-exp of each query's scores, including the sink
    delta   [heads, n_q]  dot product of each query's output and the output's gradient
    """
    return -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta).sum(dim=1).to(sinks.dtype)
