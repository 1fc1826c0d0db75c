"""Losses that depend on the difference between the two responses' scores. :mod:`scores` explains the shared options.

One loss, ``dpop``, also depends directly on the log-ratio of the chosen response.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor

from dpo_engine.objective.contract import (
    LOSSES,
    NonNegative,
    PairData,
    PairLogps,
    Positive,
    Smoothing,
    log_ratios,
    per_token,
)
from dpo_engine.objective.scores import (
    Divergence,
    Options,
    known_at_init,
    logistic,
    score_problems,
    scores,
    softplus,
    with_reference,
)

# ColossalChat adds this number to response lengths. `simpo_reference` adds it too, to compute the same losses.
LENGTH_OFFSET = 0.01


def _sigmoid_at_init(options: Options) -> float | None:
    if options["reference_free"] or options["margin_scale"]:
        return None
    smoothing, gamma = options["label_smoothing"], options["gamma"]
    return (1 - smoothing) * softplus(gamma) + smoothing * softplus(-gamma)


@LOSSES.register(
    "sigmoid",
    "dpo",
    "dpo_loss",
    needs_reference=with_reference,
    needs_data=lambda options: ("margins",) if options["margin_scale"] else (),
    at_init=_sigmoid_at_init,
    problems=score_problems,
    trl="sigmoid",
)
def sigmoid(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData | None = None,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    gamma: NonNegative = 0.0,
    margin_scale: NonNegative = 0.0,
    average: bool = False,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """Negative log-likelihood that chosen beats rejected, in the Bradley-Terry model with implicit rewards.

    ``-log sigmoid(beta (score_c - score_r) - gamma - margin_scale margin)``

    label_smoothing  probability that a pair's label is wrong
    gamma            target margin between the rewards of chosen and rejected, the same for every pair
    margin_scale     factor of the margin in the pair's record; the product is added to the target margin

    Returns  [b]  one loss per pair, in nats

    *Source*: DPO (arXiv 2305.18290) eq. 7; smoothing: cDPO (Mitchell 2023) eq. 3; margins: ODPO (arXiv 2402.10571).
    """
    chosen, rejected = scores(policy, reference, divergence, alpha, reference_free)
    if average:
        chosen, rejected = per_token(policy, chosen, rejected)
    margin = beta * (chosen - rejected) - gamma  # [b]
    if margin_scale:
        margin = margin - margin_scale * data.margins
    return logistic(margin, label_smoothing)


@LOSSES.register(
    "sigmoid_norm",
    "dpo_norm",
    needs_reference=with_reference,
    averages=True,
    at_init=known_at_init(lambda options: math.log(2)),
    problems=score_problems,
    trl="sigmoid_norm",
)
def sigmoid_norm(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: Positive = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """``sigmoid`` loss with scores per token: ``-log sigmoid(beta (score_c / L_c - score_r / L_r))``.

    Returns  [b]  one loss per pair, in nats

    *Source*: Tulu 3 (arXiv 2411.15124).
    """
    chosen, rejected = per_token(policy, *scores(policy, reference, divergence, alpha, reference_free))
    return -F.logsigmoid(beta * (chosen - rejected))


@LOSSES.register(
    "hinge",
    needs_reference=with_reference,
    at_init=known_at_init(lambda options: 1.0),
    problems=score_problems,
    trl="hinge",
)
def hinge(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: Positive = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """Hinge loss ``max(0, 1 - beta (score_c - score_r))``.

    Returns  [b]  one loss per pair

    *Source*: SLiC-HF (arXiv 2305.10425) and RSO (arXiv 2309.06657).
    """
    chosen, rejected = scores(policy, reference, divergence, alpha, reference_free)
    return torch.relu(1 - beta * (chosen - rejected))


@LOSSES.register(
    "ipo",
    needs_reference=with_reference,
    at_init=known_at_init(lambda options: 1 / (4 * options["beta"] ** 2)),
    problems=score_problems,
    trl="ipo",
)
def ipo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: Positive = 0.1,
    average: bool = True,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """Squared loss ``(score_c - score_r - 1 / (2 beta))^2``.

    average  divide each score by the number of tokens in the response. If false, a score belongs to the whole
             response, as in the paper's equation; such scores need a different beta

    Returns  [b]  one loss per pair

    *Source*: IPO (arXiv 2310.12036) eq. 17, where beta is called tau.
    """
    chosen, rejected = scores(policy, reference, divergence, alpha, reference_free)
    if average:
        chosen, rejected = per_token(policy, chosen, rejected)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@LOSSES.register(
    "robust",
    needs_reference=with_reference,
    at_init=known_at_init(lambda options: math.log(2)),
    problems=score_problems,
    trl="robust",
)
def robust(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """Unbiased estimate of the ``sigmoid`` loss for correct labels, if each given label is wrong with probability e.

    ``(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e)`` with ``m = beta (score_c - score_r)`` and
    ``e = label_smoothing``

    Returns  [b]  one loss per pair, in nats

    *Source*: Robust DPO (arXiv 2403.00409).
    """
    chosen, rejected = scores(policy, reference, divergence, alpha, reference_free)
    margin = beta * (chosen - rejected)  # [b]
    clean, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    return (-(1 - label_smoothing) * clean + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def _exo_pair_at_init(options: Options) -> float:
    smoothing = options["label_smoothing"]
    return -math.log(2) - 0.5 * math.log(smoothing * (1 - smoothing))


@LOSSES.register(
    "exo_pair",
    needs_reference=with_reference,
    at_init=known_at_init(_exo_pair_at_init),
    problems=score_problems,
    trl="exo_pair",
)
def exo_pair(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """Reverse KL divergence between the policy's preference and the smoothed label.

    ``sigmoid(m) (log sigmoid(m) - log(1 - e)) + sigmoid(-m) (log sigmoid(-m) - log e)`` with
    ``m = beta (score_c - score_r)`` and ``e = label_smoothing``

    Returns  [b]  one loss per pair, in nats

    *Source*: EXO (arXiv 2402.00856) eq. 16 for two responses.
    """
    chosen, rejected = scores(policy, reference, divergence, alpha, reference_free)
    margin = beta * (chosen - rejected)  # [b]
    right = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    wrong = (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return right + wrong


@LOSSES.register(
    "discopop",
    needs_reference=with_reference,
    at_init=known_at_init(lambda options: 0.5 * (1 + math.log(2))),
    problems=score_problems,
    trl="discopop",
)
def discopop(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: Positive = 0.1,
    tau: Positive = 0.05,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    reference_free: bool = False,
) -> Tensor:
    """DiscoPOP: a weighted sum of the logistic and the exponential loss; their weights depend on the margin.

    ``-(1 - k) log sigmoid(m) + k exp(-m)`` with ``m = beta (score_c - score_r)`` and ``k = sigmoid(m / tau)``

    The formula was found by a language model.

    Returns  [b]  one loss per pair

    *Source*: DiscoPOP (arXiv 2406.08414) eq. 5.
    """
    chosen, rejected = scores(policy, reference, divergence, alpha, reference_free)
    margin = beta * (chosen - rejected)  # [b]
    # k exp(-m) is computed as exp(log k - m), because 0 * inf would be NaN for large negative margins.
    return -(-margin / tau).sigmoid() * F.logsigmoid(margin) + torch.exp(F.logsigmoid(margin / tau) - margin)


@LOSSES.register("dpop", "smaug", needs_reference=True, at_init=math.log(2))
def dpop(policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1, dpop_lambda: NonNegative = 50.0) -> Tensor:
    """``sigmoid`` loss with a penalty if the chosen response is less likely under the policy than under the reference.

    ``-log sigmoid(beta (a - b - dpop_lambda max(0, -a)))`` with log-ratios ``a`` of chosen and ``b`` of rejected

    Returns  [b]  one loss per pair, in nats

    *Source*: Smaug (arXiv 2402.13228).
    """
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * torch.relu(-chosen)))


@LOSSES.register(
    "simpo_reference",
    "simpo_loss",
    needs_reference=True,
    averages=True,
    at_init=lambda options: softplus(options["gamma"]),
)
def simpo_reference(
    policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1, gamma: NonNegative = 1.4
) -> Tensor:
    """The variant of SimPO in ColossalChat, which keeps the reference.

    ``-log sigmoid(beta (a / (L_c + 0.01) - b / (L_r + 0.01)) - gamma)``

    a, b  log-ratios of chosen and rejected

    Returns  [b]  one loss per pair, in nats

    *Source*: ColossalChat's ``--loss_type simpo_loss``. SimPO as published is the loss ``simpo``.
    """
    chosen, rejected = log_ratios(policy, reference)
    chosen = chosen / (policy.chosen_tokens + LENGTH_OFFSET)
    rejected = rejected / (policy.rejected_tokens + LENGTH_OFFSET)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
