"""A fork's own kernels: the operations of ``dpo_kernels/eager.py``, here with the partition function by logsumexp."""

import torch
from dpo_kernels import eager
from dpo_kernels.dispatch import register_backend, use_backend
from torch import Tensor


class LogSumExp:
    """A backend is any object with eager's functions; those it does not change it takes from there."""

    shard_grad = staticmethod(eager.shard_grad)
    shard_entropies = staticmethod(eager.shard_entropies)

    @staticmethod
    def shard_stats(logits: Tensor, targets: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`dpo_kernels.eager.shard_stats`; the sum is 1, because its logarithm is in the maximum."""
        _, _, target_logit = eager.shard_stats(logits, targets, start, valid)
        lse = torch.logsumexp(logits[:, :valid].float(), dim=1)
        return lse, torch.ones_like(lse), target_logit


register_backend("logsumexp", LogSumExp)
use_backend("logsumexp")
