"""Losses that depend on each response's log-ratio, and not only on the difference of the two log-ratios."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_engine.objective.contract import LOSSES, PairData, PairLogps, Positive, log_ratios


@LOSSES.register("nca_pair", needs_reference=True, at_init=2 * math.log(2), trl="nca_pair")
def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """Noise-contrastive alignment: ``-log sigmoid(beta a) - log sigmoid(-beta a) / 2 - log sigmoid(-beta b) / 2``.

    a, b  log-ratios of chosen and rejected

    Returns  [b]  one loss per pair, in nats

    *Source*: NCA (arXiv 2402.05369), for two responses with rewards 1 and 0.
    """
    chosen, rejected = (beta * log_ratio for log_ratio in log_ratios(policy, reference))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@LOSSES.register(
    "bco_pair",
    needs_reference=True,
    couples_pairs=lambda options: options["shift"] != "none",
    at_init=2 * math.log(2),
    trl="bco_pair",
)
def bco_pair(
    policy: PairLogps,
    reference: PairLogps,
    *,
    data: PairData | None = None,
    beta: Positive = 0.1,
    shift: Literal["none", "batch", "batch_detached"] = "none",
) -> Tensor:
    """Binary classifier optimization: ``-log sigmoid(beta a - delta) - log sigmoid(delta - beta b)``.

    a, b   log-ratios of chosen and rejected
    shift  value of ``delta``. ``none``: 0. ``batch``: mean of ``beta a`` and ``beta b`` over all pairs in the global
           batch, weighted by the weights of the pairs. ``batch_detached``: the same mean, without its gradient

    Returns  [b]  one loss per pair, in nats

    *Source*: BCO (arXiv 2404.04656), which uses a running mean without gradient for ``delta``.
    """
    chosen, rejected = (beta * log_ratio for log_ratio in log_ratios(policy, reference))
    if shift != "none":
        means = 0.5 * (chosen + rejected)
        delta = (data.weights * means).sum() / data.weights.sum()
        delta = delta.detach() if shift == "batch_detached" else delta
        chosen, rejected = chosen - delta, rejected - delta
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@LOSSES.register("sppo_hard", needs_reference=True, at_init=lambda options: 0.5 / options["beta"] ** 2, trl="sppo_hard")
def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """SPPO with win probabilities 1 and 0: ``(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2``.

    a, b  log-ratios of chosen and rejected

    Returns  [b]  one loss per pair

    *Source*: SPPO (arXiv 2405.00675) eq. 4.7.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@LOSSES.register("apo_zero", needs_reference=True, at_init=1.0, trl="apo_zero")
def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """APO-zero: ``1 - sigmoid(beta a) + sigmoid(beta b)``.

    It raises the log-ratio of the chosen response and lowers the log-ratio of the rejected response. Use it if the
    chosen responses are better than the responses that the model itself generates.

    a, b  log-ratios of chosen and rejected

    Returns  [b]  one loss per pair

    *Source*: APO (arXiv 2408.06266) eq. 7.
    """
    chosen, rejected = (beta * log_ratio for log_ratio in log_ratios(policy, reference))
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@LOSSES.register("apo_down", needs_reference=True, at_init=1.0, trl="apo_down")
def apo_down(policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """APO-down: ``sigmoid(beta a) + 1 - sigmoid(beta (a - b))``.

    It lowers the log-ratios of both responses, and lowers the log-ratio of the rejected response more. Use it if the
    chosen responses are worse than the responses that the model itself generates.

    a, b  log-ratios of chosen and rejected

    Returns  [b]  one loss per pair

    *Source*: APO (arXiv 2408.06266) eq. 8.
    """
    chosen, rejected = (beta * log_ratio for log_ratio in log_ratios(policy, reference))
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
