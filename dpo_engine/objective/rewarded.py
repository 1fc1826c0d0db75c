"""Losses that fit the difference of implicit rewards to the difference of ground-truth rewards.

The formulas use ``m = beta (a - b)``, with log-ratios ``a`` of chosen and ``b`` of rejected, and
``g = scale (chosen_reward - rejected_reward)``, with rewards from the data. The initial value of these losses
therefore depends on the data.

scale    factor of the ground-truth rewards
average  divide each log-ratio by the number of tokens in the response

*Source*: reward-aware preference optimization (arXiv 2502.00203); Nemotron-4 340B (arXiv 2406.11704).
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_engine.objective.contract import LOSSES, PairData, PairLogps, Positive, log_ratios, per_token

COLUMNS = ("chosen_rewards", "rejected_rewards")


def _margins(
    policy: PairLogps, reference: PairLogps, data: PairData, beta: float, scale: float, average: bool
) -> tuple[Tensor, Tensor]:
    """Return the implicit and the ground-truth reward differences, each [b]."""
    chosen, rejected = log_ratios(policy, reference)
    if average:
        chosen, rejected = per_token(policy, chosen, rejected)
    return beta * (chosen - rejected), scale * (data.chosen_rewards - data.rejected_rewards)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)`` in nats, where ``p`` and ``q`` are the log-odds of two Bernoulli distributions.

    The result has the shape of ``p``.
    """
    heads = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    return heads + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))


@LOSSES.register("rpo_sq", needs_reference=True, needs_data=COLUMNS)
def rpo_sq(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData,
    beta: Positive = 0.1,
    scale: Positive = 1.0,
    average: bool = False,
) -> Tensor:
    """Squared difference ``(m - g)^2``.

    Returns  [b]  one loss per pair
    """
    implicit, truth = _margins(policy, reference, data, beta, scale, average)
    return (implicit - truth) ** 2


@LOSSES.register("rpo_bwd_kl", needs_reference=True, needs_data=COLUMNS)
def rpo_bwd_kl(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData,
    beta: Positive = 0.1,
    scale: Positive = 1.0,
    average: bool = False,
) -> Tensor:
    """KL divergence ``sigmoid(g) (log sigmoid(g) - log sigmoid(m)) + sigmoid(-g) (log sigmoid(-g) - log sigmoid(-m))``.

    NeMo-Aligner calls this direction "backward".

    Returns  [b]  one loss per pair, in nats
    """
    implicit, truth = _margins(policy, reference, data, beta, scale, average)
    return _kl(truth, implicit)


@LOSSES.register("rpo_fwd_kl", needs_reference=True, needs_data=COLUMNS)
def rpo_fwd_kl(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData,
    beta: Positive = 0.1,
    scale: Positive = 1.0,
    average: bool = False,
) -> Tensor:
    """KL divergence ``sigmoid(m) (log sigmoid(m) - log sigmoid(g)) + sigmoid(-m) (log sigmoid(-m) - log sigmoid(-g))``.

    NeMo-Aligner calls this direction "forward".

    Returns  [b]  one loss per pair, in nats
    """
    implicit, truth = _margins(policy, reference, data, beta, scale, average)
    return _kl(implicit, truth)
