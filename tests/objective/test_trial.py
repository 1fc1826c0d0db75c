"""Tests of the trial of a loss on two example pairs.

Built-in losses pass, and each kind of mistake has its own message.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from dpo_engine.objective.losses import LOSSES, loss_options, with_defaults
from dpo_engine.objective.trial import trial_problems

MIXED = {"losses": [{"name": "sigmoid", "weight": 0.8}, {"name": "sft"}]}
COUPLED = {"losses": [{"name": "aot"}, {"name": "sft"}]}


@pytest.mark.parametrize("name", sorted({id(loss): name for name, loss in LOSSES.items()}.values()))
def test_losses_of_the_engine_pass(name):
    for given in [MIXED, COUPLED] if "losses" in loss_options(LOSSES[name]) else [{}]:
        assert trial_problems(name, with_defaults(LOSSES[name], given)) == []


@pytest.mark.parametrize(
    "name, options",
    [
        ("bco_pair", {"shift": "batch"}),
        ("cpo", {"nll_weight": 0.0}),
        ("cpo", {"kind": "hinge"}),
        ("sigmoid", {"average": True}),
        ("sigmoid", {"margin_scale": 1.0}),
        ("sft", {"nll": "sum"}),
        ("simpo", {"alpha": 0.5}),
    ],
)
def test_other_options_pass(name, options):
    assert trial_problems(name, with_defaults(LOSSES[name], options)) == []


def margin(policy, reference):
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


def right(policy, reference):
    return F.softplus(-margin(policy, reference))


def summed(policy, reference):
    return right(policy, reference).sum()


def number(policy, reference):
    return 0.7


def infinite(policy, reference):
    return right(policy, reference) / 0.0


def detached(policy, reference):
    return right(policy, reference).detach()


def centered(policy, reference):
    found = margin(policy, reference)
    return F.softplus(-(found - found.mean()))


def shuffled(policy, reference):
    """Return each pair's own loss, with the gradient of the other pair's loss."""
    losses = right(policy, reference)
    return losses.detach() + losses.flip(0) - losses.flip(0).detach()


def secret(policy, reference, *, data):
    return right(policy, reference) + data.margins


def broken(policy, reference):
    return policy.chosen_entropy + 1


def steep(policy, reference):
    return torch.sqrt(margin(policy, reference) * 0)


CASES = [
    (right, {"at_init": math.log(2)}, None),
    (centered, {"couples_pairs": True, "at_init": math.log(2)}, None),
    (secret, {"needs_data": ("margins",)}, None),
    (summed, {}, "the loss returned a tensor of shape [] for 2 pairs; it must return one value per pair"),
    (number, {}, "the loss returned 0.7 for 2 pairs; it must return one value per pair"),
    (infinite, {}, "the losses of two example pairs are [inf, inf]; they must be finite"),
    (detached, {}, "the loss has no gradient for the policy's log-probabilities; compute the loss without detach()"),
    (steep, {}, "the gradient of the loss is not finite on two example pairs; correct the loss"),
    (
        right,
        {"at_init": 0.5},
        "the losses of two example pairs are [0.693147, 0.693147] if policy and reference are equal, but at_init is",
    ),
    (centered, {}, "a pair's loss, or the gradient of this loss, depends on the other pairs of the micro-batch, so"),
    (shuffled, {}, "a pair's loss, or the gradient of this loss, depends on the other pairs of the micro-batch"),
    (secret, {}, "the loss reads columns of data that its registration does not list; list them in needs_data"),
    (broken, {}, "the loss failed on two example pairs (TypeError: unsupported operand"),
    (
        right,
        {"couple_pairs": True},
        "the loss is registered with couple_pairs, which is not a keyword of LOSSES.register; did you",
    ),
]


@pytest.mark.parametrize("loss, facts, says", CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_mistakes_have_their_own_messages(loss, facts, says):
    def entry(policy, reference, **options):
        return loss(policy, reference, **options)

    if loss is secret:

        def entry(policy, reference, *, data):
            return loss(policy, reference, data=data)

    LOSSES.register("tried", **facts)(entry)
    try:
        found = trial_problems("tried", {})
    finally:
        del LOSSES["tried"]
    if says is None:
        assert found == []
    else:
        (line,) = found
        assert line.startswith(f"loss.name=tried: {says}")
