"""Preference losses: pure functions of summed log-probabilities, one per pair. No collectives, no means.

A loss is registered under its name with the facts the engine needs: ``needs_reference`` and ``at_init``, its value when
policy and reference are equal, given its options. Its keyword-only parameters are its options, and their defaults.
"""

import math
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_engine.registry import Registry

LOSSES = Registry("loss")


class PairLogps(NamedTuple):
    """Log-probabilities of a micro-batch's responses under one model.

    chosen, rejected                [b]  fp32, nats, summed over each response's tokens
    chosen_tokens, rejected_tokens  [b]  fp32, how many tokens were summed
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "PairLogps":
        """The same record with ``change`` applied to every tensor."""
        return PairLogps(*(change(tensor) for tensor in self))


def loss_options(loss: Callable[..., Tensor]) -> dict[str, Parameter]:
    """The options of ``loss``: its keyword-only parameters, by name."""
    return {name: p for name, p in signature(loss).parameters.items() if p.kind is Parameter.KEYWORD_ONLY}


@LOSSES.register("sigmoid", needs_reference=True, at_init=lambda options: math.log(2.0))
def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood that ``chosen`` beats ``rejected`` under the Bradley-Terry model of implicit rewards.

    beta             strength of the pull to the reference, > 0
    label_smoothing  probability that a pair's label is wrong, in [0, 0.5)

    Returns  [b]  nats

    *Source*: DPO (arXiv 2305.18290) eq. 7; smoothing: cDPO (Mitchell 2023) eq. 3.
    """
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)  # [b]
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def _check_sigmoid(options: dict[str, Any]) -> list[str]:
    found = []
    if not options["beta"] > 0:
        found.append(f"loss.beta={options['beta']}: must be greater than 0, else nothing is learnt; 0.1 is usual")
    if not 0 <= options["label_smoothing"] < 0.5:
        found.append(f"loss.label_smoothing={options['label_smoothing']}: must lie in [0, 0.5); 0 is off")
    return found


sigmoid.problems = _check_sigmoid


def rewards(policy: PairLogps, reference: PairLogps | None, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta (log pi - log pi_ref)`` of chosen and rejected, each [b]; no reference counts as 0."""
    if reference is None:
        return beta * policy.chosen, beta * policy.rejected
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


def accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where chosen has the higher reward, a half where they tie, else 0. [b]"""
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
