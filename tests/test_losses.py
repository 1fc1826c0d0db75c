"""Losses against their formulas retyped, and what every registered loss must satisfy."""

import math

import pytest
import torch

from dpo_engine.objective.losses import LOSSES, PairLogps, accuracies, loss_options, rewards

COUNTS = torch.tensor([3.0, 5.0, 2.0, 9.0], dtype=torch.float64)


def pairs(seed: int = 0) -> tuple[PairLogps, PairLogps]:
    generator = torch.Generator().manual_seed(seed)

    def record() -> PairLogps:
        chosen, rejected = -20 * torch.rand(2, 4, dtype=torch.float64, generator=generator)
        return PairLogps(chosen, rejected, COUNTS, COUNTS.flip(0))

    return record(), record()


def defaults(name: str) -> dict:
    return {key: option.default for key, option in loss_options(LOSSES[name]).items()}


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sigmoid_is_the_papers_formula(beta, smoothing):
    policy, reference = pairs()
    got = LOSSES["sigmoid"](policy, reference, beta=beta, label_smoothing=smoothing)
    for i in range(4):
        log_ratio_chosen = policy.chosen[i].item() - reference.chosen[i].item()
        log_ratio_rejected = policy.rejected[i].item() - reference.rejected[i].item()
        h = beta * (log_ratio_chosen - log_ratio_rejected)
        p = 1 / (1 + math.exp(-h))
        expected = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
        assert got[i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_by_finite_differences(name):
    policy, reference = pairs(1)
    chosen, rejected = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()

    def loss(chosen, rejected):
        return LOSSES[name](PairLogps(chosen, rejected, COUNTS, COUNTS.flip(0)), reference, **defaults(name))

    assert torch.autograd.gradcheck(loss, (chosen, rejected))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_shape_and_value_at_initialisation(name):
    _, reference = pairs(2)
    got = LOSSES[name](reference, reference, **defaults(name))
    assert got.shape == (4,)
    expected = LOSSES[name].at_init(defaults(name))
    torch.testing.assert_close(got, torch.full((4,), expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_likelier_chosen_response_lowers_the_loss(name):
    policy, reference = pairs(3)
    before = LOSSES[name](policy, reference, **defaults(name))
    after = LOSSES[name](policy._replace(chosen=policy.chosen + 1), reference, **defaults(name))
    assert (after < before).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_option_changes_the_loss(name):
    policy, reference = pairs(4)
    before = LOSSES[name](policy, reference, **defaults(name))
    for option, value in defaults(name).items():
        changed = LOSSES[name](policy, reference, **{**defaults(name), option: value + 0.3})
        assert not torch.allclose(before, changed), option


def test_ties_count_as_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])
    assert accuracies(chosen, rejected).tolist() == [0.0, 0.5, 1.0]


def test_rewards_are_scaled_log_ratios():
    policy, reference = pairs(5)
    chosen, rejected = rewards(policy, reference, beta=0.3)
    torch.testing.assert_close(chosen, 0.3 * (policy.chosen - reference.chosen))
    torch.testing.assert_close(rejected, 0.3 * (policy.rejected - reference.rejected))
    chosen, _ = rewards(policy, None, beta=0.3)
    torch.testing.assert_close(chosen, 0.3 * policy.chosen)
