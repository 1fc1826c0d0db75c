"""Alignment by optimal transport (AOT): shift one distribution above another. Each distribution has one value per pair.

These losses couple pairs: the loss is a mean over the quantiles of both distributions. If all pairs have the same
weight, the loss compares the two sorted lists of values, element by element. Otherwise, each pair covers a range of
quantiles that is proportional to its weight: a pair of weight 2 counts like two copies, and a pair of weight 0 does not
count. The loss at a quantile is assigned to the pair at that quantile of the first distribution. The weighted mean over
pairs is then equal to the mean over quantiles.

*Source*: distributional preference alignment (arXiv 2406.05882).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dpo_engine.objective.contract import LOSSES, PairData, PairLogps, Positive, Smoothing, log_ratios
from dpo_engine.objective.scores import logistic


def over_quantiles(first: Tensor, second: Tensor, weights: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute ``value(quantile of first - same quantile of second)`` for each pair, averaged over the pair's quantiles.

    first, second  [n]  each pair's value in the first and in the second distribution
    weights        [n]  weights of the pairs

    Returns  [n]  mean over the quantiles that the pair covers in ``first``; 0 if the pair's weight is 0
    """
    order, other = first.argsort(stable=True), second.argsort(stable=True)
    ends, other_ends = weights.double()[order].cumsum(0), weights.double()[other].cumsum(0)  # [n]
    edges = torch.cat([ends, other_ends]).sort().values  # [2n]
    widths = edges.diff(prepend=edges.new_zeros(1))
    middles = edges - widths / 2
    last = len(first) - 1
    pair = order[torch.searchsorted(ends, middles).clamp(max=last)]
    partner = other[torch.searchsorted(other_ends, middles).clamp(max=last)]
    values = value(first[pair] - second[partner]) * widths.to(first)
    shares = torch.zeros_like(first).index_add(0, pair, values)
    return shares / torch.where(weights > 0, weights, 1.0).to(first)


@LOSSES.register("aot", needs_reference=True, couples_pairs=True, at_init=math.log(2), trl="aot")
def aot(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """Compare the quantiles of the policy's margins with those of the reference's margins.

    ``-log sigmoid(beta (sorted(pi_c - pi_r) - sorted(ref_c - ref_r)))``

    Returns  [b]  one loss per pair, in nats
    """
    margins, reference_margins = policy.chosen - policy.rejected, reference.chosen - reference.rejected
    return over_quantiles(
        margins, reference_margins, data.weights, lambda difference: logistic(beta * difference, label_smoothing)
    )


@LOSSES.register(
    "aot_unpaired", "aot_pair", needs_reference=True, couples_pairs=True, at_init=math.log(2), trl="aot_unpaired"
)
def aot_unpaired(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """Compare the quantiles of the log-ratios of chosen responses with those of rejected responses.

    ``-log sigmoid(beta (sorted(pi_c - ref_c) - sorted(pi_r - ref_r)))``

    Returns  [b]  one loss per pair, in nats
    """
    chosen, rejected = log_ratios(policy, reference)
    return over_quantiles(
        chosen, rejected, data.weights, lambda difference: logistic(beta * difference, label_smoothing)
    )
