"""Losses that use the policy alone, without a reference.

All of them except ``simpo`` have an option ``nll``. The option selects whether and how the negative log-probability of
the chosen response is averaged:

batch_mean     mean over all tokens of chosen responses in the global batch
response_mean  mean over the tokens of the response
sum            no averaging: the sum over the tokens of the response
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_engine.objective.contract import LOSSES, NonNegative, PairData, PairLogps, Part, Positive, Smoothing, per_token
from dpo_engine.objective.scores import logistic

Nll = Literal["batch_mean", "response_mean", "sum"]


def negative_log_likelihood(policy: PairLogps, data: PairData | None, nll: Nll) -> Tensor:
    """Return the negative log-probabilities of the chosen responses [b], averaged according to ``nll``.

    ``batch_mean`` divides each response's sum by the mean length of the chosen responses in the global batch. The mean
    over pairs is then the mean over tokens. A pair's value depends on the other pairs only through this mean length.
    """
    if nll == "batch_mean":
        return -policy.chosen / data.mean_chosen_tokens.to(policy.chosen)
    return -policy.chosen / (policy.chosen_tokens.clamp(min=1) if nll == "response_mean" else 1)


def _nll_columns(options: dict[str, Any]) -> tuple[str, ...]:
    return ("mean_chosen_tokens",) if options.get("nll_weight", 1) and options["nll"] == "batch_mean" else ()


def _likelihood(weight: float, nll: Nll) -> Part:
    def term(policy: PairLogps, reference: PairLogps | None, data: PairData) -> Tensor:
        return weight * negative_log_likelihood(policy, data, nll)

    return term


@LOSSES.register("sft", needs_reference=False, needs_data=_nll_columns, likelihood_term=True, trl="sft")
def sft(
    policy: PairLogps, reference: PairLogps | None, *, data: PairData | None = None, nll: Nll = "batch_mean"
) -> Tensor:
    """Negative log-likelihood of the chosen response: ``-log pi_c``, averaged according to ``nll``.

    Returns  [b]  nats, per token unless ``nll`` is ``sum``

    *Source*: the likelihood term of RPO (arXiv 2404.19733), which uses ``response_mean``.
    """
    return negative_log_likelihood(policy, data, nll)


@LOSSES.register("simpo", needs_reference=False, averages=True, trl="simpo")
def simpo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 0.5,
    label_smoothing: Smoothing = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """SimPO: ``-log sigmoid(beta (r_c - r_r) - gamma)``, where a reward ``r`` is the mean log-probability per token.

    gamma  target margin for ``beta (r_c - r_r)``
    alpha  AlphaPO's change of the reward: for a mean log-probability ``p``, the reward is ``p`` if alpha is 0, and
           ``(1 - exp(-alpha p)) / alpha`` otherwise

    Returns  [b]  one loss per pair, in nats

    *Source*: SimPO (arXiv 2405.14734); alpha: AlphaPO (arXiv 2501.03884).
    """
    chosen, rejected = per_token(policy, policy.chosen, policy.rejected)
    if alpha:
        chosen, rejected = (-torch.expm1(-alpha * mean) / alpha for mean in (chosen, rejected))
    return logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def _cpo_parts(options: dict[str, Any]) -> dict[str, Part]:
    weight, nll = options["nll_weight"], options["nll"]
    if not weight:
        return {}

    def preference(policy: PairLogps, reference: PairLogps | None, data: PairData) -> Tensor:
        return cpo(policy, reference, data=data, **{**options, "nll_weight": 0.0})

    return {"preference": preference, "likelihood": _likelihood(weight, nll)}


def _orpo_parts(options: dict[str, Any]) -> dict[str, Part]:
    def preference(policy: PairLogps, reference: PairLogps | None, data: PairData) -> Tensor:
        return -options["beta"] * F.logsigmoid(_log_odds_ratio(policy))

    return {"preference": preference, "likelihood": _likelihood(1.0, options["nll"])}


def _cpo_problems(options: dict[str, Any]) -> list[str]:
    found, kind, smoothing = [], options["kind"], options["label_smoothing"]
    if smoothing and kind != "sigmoid":
        found.append(
            f"label_smoothing={smoothing}: applies only to kind sigmoid, but kind is {kind}; remove label_smoothing"
        )
    if options["nll"] != "batch_mean" and not options["nll_weight"]:
        found.append(f"nll={options['nll']}: has no effect when nll_weight is 0; remove nll")
    return found


@LOSSES.register(
    "cpo",
    needs_reference=False,
    needs_data=_nll_columns,
    averages=lambda options: options["kind"] == "ipo",
    likelihood_term=lambda options: options["nll_weight"] > 0,
    problems=_cpo_problems,
    parts=_cpo_parts,
    trl="cpo",
)
def cpo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    data: PairData | None = None,
    beta: Positive = 0.1,
    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    label_smoothing: Smoothing = 0.0,
    nll_weight: NonNegative = 1.0,
    nll: Nll = "batch_mean",
) -> Tensor:
    """Contrastive preference optimization: ``-log sigmoid(beta (log pi_c - log pi_r)) + nll_weight nll``.

    In this formula, ``nll`` is the negative log-probability of the chosen response, averaged according to the option
    ``nll``.

    kind  form of the first term. ``sigmoid``: as above. ``hinge``: ``max(0, 1 - beta (log pi_c - log pi_r))``.
          ``ipo``: ``(log pi_c / L_c - log pi_r / L_r - 1 / (2 beta))^2``

    Returns  [b]  one loss per pair

    *Source*: CPO (arXiv 2401.08417) eq. 3.
    """
    if kind == "ipo":
        chosen, rejected = per_token(policy, policy.chosen, policy.rejected)
        losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    else:
        margin = beta * (policy.chosen - policy.rejected)  # [b]
        losses = torch.relu(1 - margin) if kind == "hinge" else logistic(margin, label_smoothing)
    return losses + nll_weight * negative_log_likelihood(policy, data, nll) if nll_weight else losses


def _log1mexp(x: Tensor) -> Tensor:
    """Compute ``log(1 - exp(x))`` for ``x < 0``, elementwise.

    There are two mathematically equal formulas. Each element is computed with the formula that is accurate for it.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = torch.log(-torch.expm1(x))
    return torch.where(x > -0.6931471805599453, near, torch.log1p(-torch.exp(x)))


def _log_odds_ratio(policy: PairLogps) -> Tensor:
    chosen, rejected = per_token(policy, policy.chosen, policy.rejected)
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


@LOSSES.register(
    "orpo", needs_reference=False, needs_data=_nll_columns, averages=True, likelihood_term=True, parts=_orpo_parts
)
def orpo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    data: PairData | None = None,
    beta: Positive = 0.1,
    nll: Nll = "response_mean",
) -> Tensor:
    """ORPO: negative log-likelihood of the chosen response plus a term for the odds ratio.

    ``nll - beta log sigmoid(log odds_c - log odds_r)``, where a response's odds are ``p / (1 - p)``, and ``p`` is the
    geometric mean of its token probabilities. In this formula, ``nll`` is the negative log-likelihood, averaged
    according to the option ``nll``.

    Returns  [b]  one loss per pair, in nats

    *Source*: ORPO (arXiv 2403.07691) eq. 4 and 7, where beta is called lambda.
    """
    return negative_log_likelihood(policy, data, nll) - beta * F.logsigmoid(_log_odds_ratio(policy))
