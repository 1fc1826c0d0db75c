"""The definition of every operation, in plain torch. Other backends are compared with this one."""

import torch
from torch import Tensor


def shard_stats(logits: Tensor, targets: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """What one vocabulary shard contributes to the log-probability of each target.

    logits   [n, v/t]  this shard, any float dtype, not modified
    targets  [n]       global token ids; ids outside this shard contribute nothing
    start              global id of the shard's first column
    valid              columns that are real tokens, the rest is padding and takes no part

    Returns  maximum [n] fp32 (-inf where no column is valid), sum_exp [n] fp32 of exp(logit - maximum),
             target_logit [n] fp32 (0 where the target lies elsewhere)
    """
    columns = logits[:, :valid].float()
    if valid == 0:
        empty = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
        return empty - torch.inf, empty, empty.clone()
    maximum = columns.amax(dim=1)
    sum_exp = (columns - maximum[:, None]).exp().sum(dim=1)
    local = targets - start
    here = (local >= 0) & (local < valid)
    target_logit = columns.gather(1, local.clamp(0, valid - 1)[:, None])[:, 0]
    return maximum, sum_exp, torch.where(here, target_logit, 0.0)


def shard_entropies(logits: Tensor, lse: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """What one vocabulary shard contributes to the entropies of each row's distribution ``p``.

    logits   [n, v/t]  as in :func:`shard_stats`, not modified
    lse      [n]       fp32, log of the partition function over all shards

    Returns  entropy [n] fp32 of ``-p log p`` and squares [n] fp32 of ``p^2``: sums over the shard's valid columns of
             terms that are not negative, so that shards add up without cancellation
    """
    probabilities = (logits[:, :valid].float() - lse[:, None]).exp()
    return torch.special.entr(probabilities).sum(dim=1), probabilities.square().sum(dim=1)


def shard_grad(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, start: int, valid: int) -> Tensor:
    """Gradient of ``sum(grad * (target_logit - lse))`` with respect to one vocabulary shard.

    logits   [n, v/t]  as in :func:`shard_stats`, not modified
    lse      [n]       fp32, log of the partition function over all shards
    grad     [n]       fp32, gradient of each row's log-probability

    Returns  [n, v/t]  in the dtype of ``logits``; 0 in padding columns
    """
    out = torch.zeros_like(logits)
    if valid:
        probabilities = (logits[:, :valid].float() - lse[:, None]).exp()
        shard = -grad[:, None] * probabilities
        local = targets - start
        here = (local >= 0) & (local < valid)
        shard.scatter_add_(1, local.clamp(0, valid - 1)[:, None], torch.where(here, grad, 0.0)[:, None])
        out[:, :valid] = shard.to(logits.dtype)
    return out
