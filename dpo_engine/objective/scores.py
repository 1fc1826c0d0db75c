"""Scores of responses, and the parts shared by the losses of score differences.

Options that several of these losses share:

beta            strength of the regularization toward the reference
divergence      *f*-divergence that keeps the policy near the reference; a score is ``f'(pi / pi_ref)``, which is the
                log-ratio for reverse_kl. Only losses of score differences offer it, because the partition function
                cancels in the difference. *Source*: f-DPO (arXiv 2309.16240)
alpha           order of the alpha divergence: 1 is reverse_kl, 0 is forward_kl
reference_free  use the policy's log-probability as the score, without a reference
average         divide scores by the number of tokens
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

# exp of larger numbers would overflow in fp32 after a few additions.
LARGEST_EXPONENT = 80.0


def score(log_ratio: Tensor, divergence: Divergence, alpha: float | None) -> Tensor:
    """``f'(pi / pi_ref)`` of a divergence; 0 if policy and reference are equal. Shape of ``log_ratio``."""
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
    """Cross-entropy of a pair whose label is wrong with probability ``label_smoothing``. Shape of ``margin``.

    *Source*: cDPO (Mitchell 2023) eq. 3.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def score_problems(options: Options) -> list[str]:
    """List contradictions between the options of scores."""
    found, divergence, alpha = [], options["divergence"], options["alpha"]
    if alpha is not None and divergence != "alpha":
        found.append(f"alpha={alpha}: applies only to divergence alpha, but divergence is {divergence}; remove it")
    if alpha is None and divergence == "alpha":
        found.append("alpha=null: divergence alpha needs an order; set alpha to a number, usually 0.5")
    if options["reference_free"] and divergence != "reverse_kl":
        found.append(f"divergence={divergence}: needs a reference, but reference_free is true; remove one of them")
    return found


def with_reference(options: Options) -> bool:
    """The fact ``needs_reference``: false with ``reference_free``."""
    return not options["reference_free"]


def known_at_init(value: Callable[[Options], float]) -> Callable[[Options], float | None]:
    """The fact ``at_init``: ``value``, or None without a reference, because the scores are then not 0."""
    return lambda options: None if options["reference_free"] else value(options)


def softplus(x: float) -> float:
    """``log(1 + exp(x))``, the logistic loss for a margin of ``-x``."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
