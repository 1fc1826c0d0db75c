"""Preference losses: pure functions from summed log-probabilities to one value per pair, without communication.

Importing this module registers the losses of these modules:

difference      losses that depend on the difference of two scores: sigmoid, ipo, hinge, robust, exo_pair, ...
rewarded        losses that fit a ground-truth reward difference: rpo_sq, rpo_bwd_kl, rpo_fwd_kl
separate        losses that depend on the log-ratio of each response: nca_pair, bco_pair, sppo_hard, apo_zero, apo_down
transport       losses that compare distributions over all pairs: aot, aot_unpaired
reference_free  losses that use the policy alone: simpo, cpo, orpo, sft
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
