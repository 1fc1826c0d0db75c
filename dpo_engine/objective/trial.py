"""Call a loss on two example pairs, to find mistakes in the loss and in its registration before a run starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_engine.objective.contract import LOSSES, PairData, PairLogps, apply_loss, loss_facts
from dpo_engine.wording import nearest, show

FACTS = (
    *("needs_reference", "couples_pairs", "needs_data", "at_init", "averages", "reward_scale", "likelihood_term"),
    *("problems", "parts", "complete", "trl"),
)
"""Names of the facts that a registration may state; :mod:`~dpo_engine.objective.contract` explains them."""

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Tolerance of comparisons: fp32 functions may round differently for vectors of different lengths."""

LENGTHS = ([12.0, 18.0], [15.0, 9.0])
POLICY = ([-20.5, -31.0], [-25.0, -28.5])
REFERENCE = ([-21.25, -29.5], [-24.0, -27.0])


def trial_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    """Call a registered loss with complete ``options`` on two example pairs. Return a line for each problem.

    The loss must return one finite value per pair, with a finite gradient for the policy's log-probabilities. If it
    needs a reference and declares a value ``at_init``, it must return this value when policy and reference are equal.
    A pair's loss, and the gradient of this loss, must depend on that pair alone, because the layout decides which pairs
    share a micro-batch. Losses that declare ``couples_pairs`` are exempt from this rule. The registration must state no
    facts other than `FACTS`.

    The example pairs have ``weights`` and the columns of :class:`~dpo_engine.objective.contract.PairData` that
    ``needs_data`` lists. All other columns are nan, as in a data set without these columns.
    """
    key = f"loss.name={name}"
    if unknown := _unknown_facts(name):
        return [f"{key}: {line}" for line in unknown]
    try:
        return [f"{key}: {line}" for line in _problems(name, options)]
    except Exception as error:  # a plugin's code may raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"{key}: the loss failed on two example pairs ({what}); correct the loss"]


def _unknown_facts(name: str) -> list[str]:
    given = [fact for fact in vars(LOSSES[name]) if not fact.startswith("_") and fact not in FACTS]
    near = {fact: nearest(fact, FACTS) for fact in given}
    return [
        f"the loss is registered with {fact}, which is not a keyword of LOSSES.register; "
        + (f"did you mean {near[fact]}?" if near[fact] else "remove it")
        for fact in given
    ]


def _problems(name: str, options: Mapping[str, Any]) -> list[str]:
    loss, facts = LOSSES[name], loss_facts(LOSSES[name], options)

    def call(policy: PairLogps, reference: PairLogps, data: PairData) -> Any:
        return apply_loss(loss, policy, reference if facts.needs_reference else None, data, options)

    policy, reference, data = _logps(POLICY), _logps(REFERENCE), _data(facts.needs_data)
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    losses = call(policy, reference, data)
    if not isinstance(losses, Tensor) or losses.shape != (2,):
        got = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, Tensor) else show(losses)
        return [f"the loss returned {got} for 2 pairs; it must return one value per pair, without summing or averaging"]
    if not losses.isfinite().all():
        everything = call(policy, reference, _data(PairData._fields))
        if isinstance(everything, Tensor) and everything.isfinite().all():
            return ["the loss reads columns of data that its registration does not list; list them in needs_data"]
        return [f"the losses of two example pairs are {show(losses.tolist())}; they must be finite"]
    if not losses.requires_grad:
        return ["the loss has no gradient for the policy's log-probabilities; compute the loss without detach()"]
    found = []
    gradients = _gradients(losses.sum(), policy)
    if not all(part.isfinite().all() for part in gradients):
        found.append("the gradient of the loss is not finite on two example pairs; correct the loss")
    if facts.needs_reference and facts.at_init is not None:
        start = call(_logps(REFERENCE), reference, data)
        if not all(math.isclose(value, facts.at_init, rel_tol=1e-4, abs_tol=1e-6) for value in start.tolist()):
            values = show([round(value, 6) for value in start.tolist()])
            found.append(
                f"the losses of two example pairs are {values} if policy and reference are equal, but at_init is "
                f"{facts.at_init:g}; correct the loss or its at_init"
            )
    if not facts.couples_pairs and not found and _coupled(call, losses, policy, reference, data):
        found.append(
            "a pair's loss, or the gradient of this loss, depends on the other pairs of the micro-batch, so training "
            "would depend on the layout; compute each pair's loss from that pair alone, or register the loss with "
            "couples_pairs=True"
        )
    return found


def _coupled(call: Any, losses: Tensor, policy: PairLogps, reference: PairLogps, data: PairData) -> bool:
    """Whether a pair's loss, or its gradient, depends on the other pair."""
    for pair in (0, 1):
        one = slice(pair, pair + 1)
        records = (policy, reference, data)
        alone = call(*(record.map(lambda column, one=one: column.detach()[one]) for record in records))
        changed = policy.map(
            lambda column, pair=pair: column.detach().clone().index_fill(0, torch.tensor(1 - pair), -9)
        )
        other = call(changed, reference, data)[one]
        same = all(torch.allclose(part, losses.detach()[one], **CLOSE) for part in (alone, other))
        across = [part[1 - pair] for part in _gradients(losses[pair], policy)]
        if not same or any(part != 0 for part in across):
            return True
    return False


def _gradients(value: Tensor, policy: PairLogps) -> list[Tensor]:
    inputs = [policy.chosen, policy.rejected]
    return list(torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True))


def _logps(sums: tuple[list[float], list[float]]) -> PairLogps:
    return PairLogps(*map(torch.tensor, (*sums, *LENGTHS)))


def _data(needed: tuple[str, ...]) -> PairData:
    columns = {
        "weights": [1.0, 1.0],
        "margins": [1.0, 2.0],
        "chosen_rewards": [3.0, 1.5],
        "rejected_rewards": [1.0, 0.5],
        "mean_chosen_tokens": [15.0, 15.0],
    }
    known = {"weights", *needed}
    return PairData(
        **{name: torch.tensor(values if name in known else [math.nan] * 2) for name, values in columns.items()}
    )
