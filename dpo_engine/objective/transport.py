"""Alignment by optimal transport: the distribution of one quantity over all pairs shall exceed that of another.

Both couple pairs: they are a mean over the quantiles of all pairs they are given, not over pairs. With equal weights
that compares two sorted lists. With others each pair takes up its weight of the quantiles, so a weight of 2 counts
like the pair twice, and a weight of 0 like no pair. The value of a quantile goes to the pair that it is of in the
first distribution, so that the weighted mean over pairs is the mean over quantiles.

*Source*: distributional preference alignment (arXiv 2406.05882).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dpo_engine.objective.contract import LOSSES, PairData, PairLogps, Positive, Smoothing, log_ratios
from dpo_engine.objective.scores import logistic


def over_quantiles(first: Tensor, second: Tensor, weights: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of ``value(quantile of first - the same quantile of second)``, shared out over the pairs of ``first``.

    first, second, weights  [n]

    Returns  [n], the mean over each pair's quantiles; 0 where the weight is 0
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
    """Quantiles of the policy's margins against those of the reference's.

    ``-log s(beta (sorted(pi_c - pi_r) - sorted(ref_c - ref_r)))``

    Returns  [b]  nats
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
    """Quantiles of the log-ratios of chosen responses against those of rejected ones.

    ``-log s(beta (sorted(pi_c - ref_c) - sorted(pi_r - ref_r)))``

    Returns  [b]  nats
    """
    chosen, rejected = log_ratios(policy, reference)
    return over_quantiles(
        chosen, rejected, data.weights, lambda difference: logistic(beta * difference, label_smoothing)
    )
