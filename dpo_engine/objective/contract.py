"""What a loss is: what it is given, what it says about itself, and the quantities every loss is judged by.

A loss is registered under its names with the facts the engine needs. A fact is a constant, or a function of the loss's
options. Keyword-only parameters are the options, and their annotations and defaults are the schema of the run file;
``data`` alone is no option: a loss that declares it is given the columns of :class:`PairData`.

needs_reference    whether it compares with a reference; without the fact it does
couples_pairs      whether a pair's loss depends on other pairs: such a loss is given the whole global batch at once
needs_data         names of the :class:`PairData` columns it reads
at_init            its value when policy and reference are equal; ``None`` where that depends on the data
per_token_rewards  whether its rewards are those of log-probabilities per token
likelihood_term    whether it adds a likelihood of whole responses, of which every token must count alike
problems           function of the options: what is wrong with their combination, as ``option=value: rule; way out``
trl                what TRL calls it, where TRL has it with the same numbers
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from dpo_engine.registry import Registry

LOSSES = Registry("loss")
JUDGED_COLUMNS = ("margins", "chosen_rewards", "rejected_rewards")

Loss = Callable[..., Tensor]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Smoothing = Annotated[float, Ge(0), Lt(0.5)]


class PairLogps(NamedTuple):
    """Log-probabilities of a micro-batch's responses under one model.

    chosen, rejected                [b]  fp32, nats, summed over each response's tokens
    chosen_tokens, rejected_tokens  [b]  fp32, how many tokens were summed
    chosen_shared, rejected_shared  [b]  fp32, nats, summed over as many first tokens as the shorter response has; None
                                         where only whole sums are known
    chosen_entropy, rejected_entropy      [b]  fp32, nats, entropy of the distribution that each token is from, summed
    chosen_collision, rejected_collision  [b]  fp32, nats, ``-log sum_v p_v^2`` of it, its collision entropy, summed;
                                               all four None where nobody asked
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
        """The same record with ``change`` applied to every tensor."""
        return PairLogps(*(None if tensor is None else change(tensor) for tensor in self))


class PairData(NamedTuple):
    """What a loss may read about pairs beside their log-probabilities.

    weights                          [b]  factors of the pairs' losses; 0 marks a place without a pair
    margins                          [b]  by how much chosen is better, in the unit of whoever judged
    chosen_rewards, rejected_rewards [b]  ground-truth rewards
    mean_chosen_tokens               [b]  tokens of a chosen response, in the weighted mean over the *global* batch: the
                                          same number at every place, known from lengths alone before anything is scored
    """

    weights: Tensor
    margins: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    mean_chosen_tokens: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "PairData":
        """The same record with ``change`` applied to every tensor."""
        return PairData(*(change(tensor) for tensor in self))


class LossFacts(NamedTuple):
    """The facts of a loss under given options; see the head of this module."""

    needs_reference: bool
    couples_pairs: bool
    needs_data: tuple[str, ...]
    at_init: float | None
    per_token_rewards: bool
    reward_scale: float
    likelihood_term: bool


def judged_fields(columns: Iterable[str]) -> list[str]:
    """Names of record fields for those of :class:`PairData`'s ``columns`` that come from records."""
    return [column.removesuffix("s") for column in columns if column in JUDGED_COLUMNS]


def loss_options(loss: Loss) -> dict[str, Parameter]:
    """The options of ``loss`` by name: its keyword-only parameters but ``data``."""
    parameters = signature(loss).parameters.items()
    return {name: p for name, p in parameters if p.kind is Parameter.KEYWORD_ONLY and name != "data"}


def with_defaults(loss: Loss, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of ``loss``: those given, and the defaults of the others that have one."""
    defaults = {name: option.default for name, option in loss_options(loss).items()}
    return {name: value for name, value in {**defaults, **given}.items() if value is not Parameter.empty}


def loss_facts(loss: Loss, options: Mapping[str, Any]) -> LossFacts:
    """What ``loss`` says about itself under all its ``options``."""

    def fact(name: str, otherwise: Any) -> Any:
        value = getattr(loss, name, otherwise)
        return value(options) if callable(value) else value

    return LossFacts(
        needs_reference=fact("needs_reference", True),
        couples_pairs=fact("couples_pairs", False),
        needs_data=tuple(fact("needs_data", ())),
        at_init=fact("at_init", None),
        per_token_rewards=fact("per_token_rewards", False),
        reward_scale=fact("reward_scale", options.get("beta", 1.0)),
        likelihood_term=fact("likelihood_term", False),
    )


def apply_loss(
    loss: Loss, policy: PairLogps, reference: PairLogps | None, data: PairData, options: Mapping[str, Any]
) -> Tensor:
    """Call ``loss``, with ``data`` if it takes it.

    Returns  [b]  the pairs' losses
    """
    if "data" in signature(loss).parameters:
        return loss(policy, reference, data=data, **options)
    return loss(policy, reference, **options)


def loss_coefficients(
    loss: Loss, policy: PairLogps, reference: PairLogps | None, data: PairData, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all pairs of a global batch, and what their weighted mean asks of each log-probability.

    policy, reference, data  of every pair of the global batch [n], in the same order on every rank

    Returns  losses [n]; chosen, rejected [n]: derivatives of ``sum(weights * losses) / sum(weights)`` by the policy's
             summed log-probabilities, so that ``sum(chosen * logp_chosen + rejected * logp_rejected)`` over any
             micro-batches has the gradient of that mean
    """
    logps = [tensor.detach().requires_grad_() for tensor in policy[:2]]
    with torch.enable_grad():
        losses = apply_loss(loss, PairLogps(*logps, *policy[2:]), reference, data, options)
        losses = torch.where(data.weights > 0, losses, 0.0)
        mean = (losses * data.weights).sum() / data.weights.sum()
        chosen, rejected = torch.autograd.grad(mean, logps, allow_unused=True, materialize_grads=True)
    return losses.detach(), chosen, rejected


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """``log pi - log pi_ref`` of chosen and rejected, each [b]."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def per_token(logps: PairLogps, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """``chosen`` and ``rejected``, each divided by the number of tokens of its response, each [b]."""
    return chosen / logps.chosen_tokens.clamp(min=1), rejected / logps.rejected_tokens.clamp(min=1)


def rewards(
    policy: PairLogps, reference: PairLogps | None, beta: float, *, average: bool = False
) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta (log pi - log pi_ref)`` of chosen and rejected, each [b]; no reference counts as 0.

    average  whether log-probabilities are taken per token
    """
    chosen, rejected = (policy.chosen, policy.rejected) if reference is None else log_ratios(policy, reference)
    if average:
        chosen, rejected = per_token(policy, chosen, rejected)
    return beta * chosen, beta * rejected


def accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where chosen has the higher reward, a half where they tie, else 0. [b]"""
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
