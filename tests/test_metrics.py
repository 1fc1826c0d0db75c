"""Every metric of the global batch against its definition retyped, pair by pair."""

import pytest
import torch

from dpo_engine.objective.losses import PairLogps
from dpo_engine.training.metrics import PAIR_METRICS, pair_sums

POLICY = PairLogps(*torch.tensor([[-4.0, -9.0, -1.0], [-6.0, -7.0, -3.0], [2.0, 3.0, 5.0], [4.0, 7.0, 11.0]]))
REFERENCE = PairLogps(*torch.tensor([[-5.0, -8.0, -1.0], [-5.0, -9.0, -3.0], [2.0, 3.0, 5.0], [4.0, 7.0, 11.0]]))
WEIGHTS = [0.5, 2.0, 0.0]  # the last is a dummy
BETA = 0.3


@pytest.mark.parametrize("reference", [REFERENCE, None], ids=["reference", "none"])
def test_every_sum_is_its_definition(reference):
    losses = torch.tensor([0.25, 0.75, 8.0])
    got = pair_sums(losses, POLICY, reference, torch.tensor(WEIGHTS), scale=BETA)
    expected = dict.fromkeys(PAIR_METRICS, 0.0)
    for i, weight in enumerate(WEIGHTS):
        chosen, rejected = POLICY.chosen[i].item(), POLICY.rejected[i].item()
        base = (0.0, 0.0) if reference is None else (reference.chosen[i].item(), reference.rejected[i].item())
        rewards = BETA * (chosen - base[0]), BETA * (rejected - base[1])
        values = {
            "loss": losses[i].item(),
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": float(rewards[0] > rewards[1]),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "sft_loss": -chosen / POLICY.chosen_tokens[i].item(),
        }
        for name, value in values.items():
            expected[name] += weight * value
    assert got.dtype is torch.float64
    assert dict(zip(PAIR_METRICS, got.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)
