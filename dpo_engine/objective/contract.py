"""The interface of a loss: its inputs, its options and facts, and the metrics that are computed for every loss.

A loss is registered under one or more names. Its first two parameters are the log-probabilities of the policy and of
the reference. Its other named parameters are its options: their annotations and defaults define the keys that the
section ``loss`` of a run's file accepts. The parameter ``data`` is not an option: a loss with this parameter receives
the columns of :class:`PairData`.

The registration also states the facts that the engine needs about the loss. Each fact is a constant or a function of
the loss's options:

needs_reference    whether the loss uses a reference; the default is true
couples_pairs      whether a pair's loss depends on other pairs; such a loss receives the whole global batch at once
needs_data         names of the :class:`PairData` columns that the loss reads, other than ``weights``
at_init            value of the loss if policy and reference are equal; ``None`` if this value depends on the data
averages           whether the loss compares means of log-probabilities over tokens, and not sums; the default is the
                   value of the option ``average``, or false if the loss has no such option
reward_scale       number by which log-ratios are multiplied to get rewards; the default is the value of the option
                   ``beta``, or 1 if the loss has no such option
likelihood_term    whether the loss contains a term for the likelihood of whole responses, in which all tokens must
                   count equally
problems           function that checks the combination of options and returns a list of lines
                   ``option=value: rule; way out``
parts              for a loss that is a sum of terms: function of the options that returns a mapping from the names of
                   the terms to functions ``(policy, reference, data) -> [b]``; the default is an empty mapping
complete           function that fills in the defaults of each nested loss and returns the options; used by ``mix`` only
trl                name in TRL, if TRL has a loss with the same values
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from dpo_engine import options
from dpo_engine.registry import Registry

LOSSES = Registry("loss", plural="losses", passes=2, reserved=("data",))
JUDGED_COLUMNS = ("margins", "chosen_rewards", "rejected_rewards")

Loss = Callable[..., Tensor]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Smoothing = Annotated[float, Ge(0), Lt(0.5)]


class PairLogps(NamedTuple):
    """Log-probabilities of the responses of a micro-batch, or of the global batch, under one model.

    All fields are fp32, except that the sums are fp64 if an fp64 model computed them.

    chosen, rejected                [b]  nats, summed over each response's tokens
    chosen_tokens, rejected_tokens  [b]  number of tokens in each sum
    chosen_shared, rejected_shared  [b]  nats, summed over the first k tokens, where k is the length of the shorter
                                         response; None if only sums over whole responses are known
    chosen_entropy, rejected_entropy      [b]  nats, entropy of each token's distribution, summed; None
                                               unless requested
    chosen_collision, rejected_collision  [b]  nats, collision entropy ``-log sum_v p_v^2`` of each token's
                                               distribution, summed; None unless requested
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_shared: Tensor | None = None
    rejected_shared: Tensor | None = None
    chosen_entropy: Tensor | None = None
    rejected_entropy: Tensor | None = None
    chosen_collision: Tensor | None = None
    rejected_collision: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "PairLogps":
        """Return a copy with ``change`` applied to every tensor."""
        return PairLogps(*(None if tensor is None else change(tensor) for tensor in self))


class PairData(NamedTuple):
    """The data that a loss may read about pairs, besides their log-probabilities.

    weights                          [b]  weights of the pairs in the mean loss; 0 marks a placeholder, not a pair
    margins                          [b]  how much better chosen is than rejected, in the annotator's unit
    chosen_rewards, rejected_rewards [b]  ground-truth rewards
    mean_chosen_tokens               [b]  weighted mean length of the chosen responses in the *global* batch, in tokens;
                                          the same number for every pair, known before scoring
    """

    weights: Tensor
    margins: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    mean_chosen_tokens: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "PairData":
        """Return a copy with ``change`` applied to every tensor."""
        return PairData(*(change(tensor) for tensor in self))


Part = Callable[[PairLogps, PairLogps | None, PairData], Tensor]


class LossFacts(NamedTuple):
    """The facts of a loss with given options; the module's docstring explains them."""

    needs_reference: bool
    couples_pairs: bool
    needs_data: tuple[str, ...]
    at_init: float | None
    averages: bool
    reward_scale: float
    likelihood_term: bool
    parts: Mapping[str, Part] = MappingProxyType({})


def judged_fields(columns: Iterable[str]) -> list[str]:
    """Return the names of the record fields for ``columns`` of :class:`PairData`; not every column has such a field."""
    return [column.removesuffix("s") for column in columns if column in JUDGED_COLUMNS]


def loss_options(loss: Loss) -> dict[str, Parameter]:
    """Return the options of ``loss`` by name: its named parameters after the first two, except ``data``."""
    return options.parameters_after(loss, LOSSES.passes, LOSSES.reserved)


def with_defaults(loss: Loss, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``given`` options of ``loss``, and the defaults of all other options that have a default."""
    return options.with_defaults(loss_options(loss), given)


def loss_facts(loss: Loss, options: Mapping[str, Any]) -> LossFacts:
    """Return the facts of ``loss`` for ``options``, which must contain every option of the loss."""

    def fact(name: str, otherwise: Any) -> Any:
        value = getattr(loss, name, otherwise)
        return value(options) if callable(value) else value

    return LossFacts(
        needs_reference=fact("needs_reference", True),
        couples_pairs=fact("couples_pairs", False),
        needs_data=tuple(fact("needs_data", ())),
        at_init=fact("at_init", None),
        averages=fact("averages", options.get("average", False)),
        reward_scale=fact("reward_scale", options.get("beta", 1.0)),
        likelihood_term=fact("likelihood_term", False),
        parts=fact("parts", {}),
    )


def apply_loss(
    loss: Loss, policy: PairLogps, reference: PairLogps | None, data: PairData, options: Mapping[str, Any]
) -> Tensor:
    """Call ``loss``, with the argument ``data`` if the loss has that parameter.

    Returns  [b]  one loss per pair
    """
    if "data" in signature(loss).parameters:
        return loss(policy, reference, data=data, **options)
    return loss(policy, reference, **options)


def loss_coefficients(
    loss: Loss, policy: PairLogps, reference: PairLogps | None, data: PairData, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the losses of a global batch, and the derivatives of their weighted mean.

    policy, reference, data  for all pairs of the global batch [n], in the same order on every rank

    Returns  losses [n], and chosen [n] and rejected [n]: the derivatives of ``sum(weights * losses) / sum(weights)``
             with respect to the policy's summed log-probabilities. The sum of
             ``chosen * logp_chosen + rejected * logp_rejected`` over all micro-batches therefore has the same gradient
             as the weighted mean.
    """
    logps = [tensor.detach().requires_grad_() for tensor in policy[:2]]
    with torch.enable_grad():
        losses = apply_loss(loss, PairLogps(*logps, *policy[2:]), reference, data, options)
        losses = torch.where(data.weights > 0, losses, 0.0)
        mean = (losses * data.weights).sum() / data.weights.sum()
        chosen, rejected = torch.autograd.grad(mean, logps, allow_unused=True, materialize_grads=True)
    return losses.detach(), chosen, rejected


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the log-ratios ``log pi - log pi_ref`` of chosen and of rejected, each [b]."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def per_token(logps: PairLogps, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``chosen`` and ``rejected``, each divided by the number of tokens in the response, each [b]."""
    return chosen / logps.chosen_tokens.clamp(min=1), rejected / logps.rejected_tokens.clamp(min=1)


def rewards(policy: PairLogps, reference: PairLogps | None, beta: float) -> tuple[Tensor, Tensor]:
    """Return the implicit rewards ``beta (log pi - log pi_ref)`` of chosen and of rejected, each [b].

    As in TRL, the log-probabilities are sums over tokens, even for a loss that compares averages.

    reference  None means that ``log pi_ref`` is 0
    """
    chosen, rejected = (policy.chosen, policy.rejected) if reference is None else log_ratios(policy, reference)
    return beta * chosen, beta * rejected


def accuracies(margins: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """Return the accuracy of each pair [b]: 0.5 for a tie; otherwise, 1 for a positive and 0 for a negative margin.

    tolerance  a pair is a tie if the absolute value of its margin is at most this number: one number for all pairs, or
               one per pair [b]
    """
    return 0.5 * (1 + torch.where(margins.abs() <= tolerance, 0.0, torch.sign(margins)))
