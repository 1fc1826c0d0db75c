"""Scores of responses, and functions shared by the losses that depend on the difference of two scores.

These losses have some options in common:

beta            strength of the regularization toward the reference
divergence      *f*-divergence that keeps the policy near the reference. A response's score is ``f'(pi / pi_ref)``, up
                to a constant; for reverse_kl, the score is the log-ratio. Losses that depend on more than the
                difference of two scores do not have this option, because the partition function cancels only in this
                difference. *Source*: f-DPO (arXiv 2309.16240)
alpha           order of the alpha divergence; order 1 equals reverse_kl, and order 0 equals forward_kl
reference_free  use the policy's log-probability as the score, without a reference
average         divide each score by the number of tokens in the response
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_engine.objective.contract import PairLogps, log_ratios

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Options = dict[str, Any]

# The largest fp32 number is about exp(88.7). This limit leaves room for a factor of up to 6,000 (exp(8.7)).
LARGEST_EXPONENT = 80.0


def score(log_ratio: Tensor, divergence: Divergence, alpha: float | None) -> Tensor:
    """Return the score of each log-ratio: ``f'(pi / pi_ref) - f'(1)``, which is 0 if policy and reference are equal."""
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    order = 0.0 if divergence == "forward_kl" else alpha if divergence == "alpha" else 1.0
    if abs(order - 1) < 1e-6:
        return log_ratio
    return torch.expm1(((order - 1) * log_ratio).clamp(max=LARGEST_EXPONENT)) / (order - 1)


def scores(
    policy: PairLogps, reference: PairLogps, divergence: Divergence, alpha: float | None, reference_free: bool
) -> tuple[Tensor, Tensor]:
    """Return the scores of chosen and rejected, each [b]."""
    if reference_free:
        return policy.chosen, policy.rejected
    chosen, rejected = log_ratios(policy, reference)
    return score(chosen, divergence, alpha), score(rejected, divergence, alpha)


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of each pair if its label is wrong with probability ``label_smoothing``.

    *Source*: cDPO (Mitchell 2023) eq. 3.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def score_problems(options: Options) -> list[str]:
    """Return one line for each contradiction between the options that determine the scores."""
    found, divergence, alpha = [], options["divergence"], options["alpha"]
    if alpha is not None and divergence != "alpha":
        found.append(f"alpha={alpha}: applies only to divergence alpha, but divergence is {divergence}; remove alpha")
    if alpha is None and divergence == "alpha":
        found.append("alpha=null: divergence alpha needs an order; set alpha to a number, usually 0.5")
    if options["reference_free"] and divergence != "reverse_kl":
        found.append(f"divergence={divergence}: needs a reference, but reference_free is true; remove one of the two")
    return found


def with_reference(options: Options) -> bool:
    """Return the property ``needs_reference`` of a loss: false if the option ``reference_free`` is set."""
    return not options["reference_free"]


def known_at_init(value: Callable[[Options], float]) -> Callable[[Options], float | None]:
    """Return a function that computes the ``at_init`` of a loss from the options of the loss.

    The function returns ``value(options)`` or, without a reference, None.

    With a reference, all scores are 0 if policy and reference are equal. Without one, the scores depend on the model
    and the data.
    """
    return lambda options: None if options["reference_free"] else value(options)


def softplus(x: float) -> float:
    """``log(1 + exp(x))``, the logistic loss for a margin of ``-x``."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
