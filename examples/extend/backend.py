"""A plugin with a kernel backend for the output layer. The backend computes statistics with torch's logsumexp."""

import torch
from torch import Tensor

from dpo_kernels import KeptLogits, LinearStats, eager
from dpo_kernels.dispatch import register_backend, use_backend


class LogSumExp:
    """The functions of the group ``head``. Two of them are taken unchanged from ``eager``.

    Any object with these functions can be a backend.
    """

    linear_grad = staticmethod(eager.linear_grad)
    linear_kept_grad = staticmethod(eager.linear_kept_grad)

    @staticmethod
    def linear_keep(*args, moments: bool = False, **scaling) -> tuple[LinearStats, KeptLogits]:
        """Like :func:`dpo_kernels.eager.linear_keep`, but return the log-sum-exp in the field ``maximum``.

        The field ``sum_exp`` is then 1, or 0 if the shard has no valid columns.
        """
        stats, kept = eager.linear_keep(*args, **scaling)
        logits = kept.logits[:, : kept.valid]
        lse = logits.logsumexp(dim=1)
        p = (logits - lse[:, None]).exp()
        stats = LinearStats(lse, p.sum(dim=1), stats.target_logit)
        if moments:
            stats = stats._replace(sum_exp_twice=p.square().sum(dim=1), sum_exp_logit=(p * logits).sum(dim=1))
        return stats, kept

    @staticmethod
    def linear_stats(hidden: Tensor, weight: Tensor, targets: Tensor, *shard, chunk: int, **options) -> LinearStats:
        """Compute the statistics of one chunk after another. The fields have the same meaning as in ``linear_keep``."""
        rows = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        parts = [LogSumExp.linear_keep(part, weight, ids, *shard, **options)[0] for part, ids in rows]
        return LinearStats(*(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)))


register_backend("logsumexp", LogSumExp)
use_backend("logsumexp")
