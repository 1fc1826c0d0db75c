"""Metrics that mean the same in every layout: weighted sums over pairs, reduced once, divided once."""

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.objective.losses import PairLogps, accuracies, rewards
from dpo_engine.platform.parallel import ParallelGroups

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
)


@torch.no_grad()
def pair_sums(
    losses: Tensor,
    policy: PairLogps,
    reference: PairLogps | None,
    weights: Tensor,
    *,
    scale: float,
    average: bool = False,
) -> Tensor:
    """Weighted sums of every metric over a micro-batch's pairs.

    losses, weights  [b]; a weight of 0 marks a place without a pair
    scale            of the rewards: the loss's beta
    average          whether rewards are those of log-probabilities per token

    Returns  [len(PAIR_METRICS)]  fp64
    """
    chosen, rejected = rewards(policy, reference, scale, average=average)
    nll = -policy.chosen / policy.chosen_tokens.clamp(min=1)
    columns = [
        losses,
        chosen,
        rejected,
        chosen - rejected,
        accuracies(chosen, rejected),
        policy.chosen,
        policy.rejected,
        nll,
    ]
    return torch.stack(columns).double() @ weights.double()


def reduce_pair_sums(sums: Tensor | None, total_weight: float, groups: ParallelGroups, device: torch.device) -> dict:
    """Means over the global batch, the same on every rank.

    sums          [len(PAIR_METRICS)] fp64, this rank's; read on the last stage, ``None`` elsewhere
    total_weight  sum of the weights of all pairs of the global batch

    *Collectives*: SUM over dp on the last stage, then a broadcast over pp from it.
    """
    if groups.last_stage and sums is not None:
        totals = sums.clone()
        dist.all_reduce(totals, group=groups.dp)
    else:
        totals = torch.zeros(len(PAIR_METRICS), dtype=torch.float64, device=device)
    if groups.pp.size() > 1:
        dist.broadcast(totals, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    return dict(zip(PAIR_METRICS, (totals / total_weight).tolist(), strict=True))
