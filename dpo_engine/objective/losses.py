"""Preference losses: pure functions of summed log-probabilities that return one value per pair, without collectives.

Importing this module registers all of them:

difference      losses of the difference between the two responses' scores: sigmoid, ipo, hinge, robust, exo_pair, ...
rewarded        distances to a ground-truth reward difference: rpo_sq, rpo_bwd_kl, rpo_fwd_kl
separate        losses with a separate term per response: nca_pair, bco_pair, sppo_hard, apo_zero, apo_down
transport       losses of distributions over all pairs: aot, aot_unpaired
reference_free  losses of the policy alone: simpo, cpo, orpo, sft
mix             a weighted sum of other losses

:mod:`~dpo_engine.objective.contract` defines the interface of a loss.
"""

from dpo_engine.objective import difference, mix, reference_free, rewarded, separate, transport
from dpo_engine.objective.contract import (
    LOSSES,
    LossFacts,
    PairData,
    PairLogps,
    accuracies,
    apply_loss,
    judged_fields,
    loss_coefficients,
    loss_facts,
    loss_options,
    per_token,
    rewards,
    with_defaults,
)

__all__ = [
    "LOSSES",
    "LossFacts",
    "PairData",
    "PairLogps",
    "accuracies",
    "apply_loss",
    "difference",
    "judged_fields",
    "loss_coefficients",
    "loss_facts",
    "loss_options",
    "mix",
    "per_token",
    "reference_free",
    "rewarded",
    "rewards",
    "separate",
    "transport",
    "with_defaults",
]
