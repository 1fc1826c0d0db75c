"""Tests of losses that couple the pairs of a global batch.

The losses do not depend on how the pairs are distributed over ranks and micro-batches, even if pairs have equal
rewards.
"""

import numpy as np
import pytest
import torch

from dpo_engine.testing.ranks import run_ranks

CHOSEN, REJECTED = [1.0, 2.0, 2.0, 2.0, -1.0, 2.0], [0.5, 0.25, 0.0, -0.5, -2.0, 3.0]
PLACES = [7, 3, 9, 1, 4, 2**24 + 1]


def coupled_losses(parts):
    """Return the losses of this rank's pairs as a dictionary. A key is the place of a pair in the data set.

    parts   for each rank and each of its micro-batches, the pairs' indices in ``CHOSEN``
    """
    from types import SimpleNamespace

    import torch.distributed as dist

    from dpo_engine.objective.losses import LOSSES, PairData, PairLogps
    from dpo_engine.training.objective import Objective

    objective = Objective(LOSSES["aot_unpaired"], {"beta": 1.0})
    mine = parts[dist.get_rank()]

    def logps(chosen, rejected, part):
        return PairLogps(*(torch.tensor(column)[part] for column in (chosen, rejected)), *[torch.ones(len(part))] * 2)

    policy = [logps(CHOSEN, REJECTED, part) for part in mine]
    reference = [logps([0.0] * 6, [0.0] * 6, part) for part in mine]
    data = [PairData(*[torch.ones(len(part))] * 5) for part in mine]
    places = [torch.tensor(PLACES)[part] for part in mine]
    groups = SimpleNamespace(dp=dist.group.WORLD)
    found = objective.couple(policy, reference, data, places, groups)
    return dict(zip(torch.cat(places).tolist(), torch.cat([one.losses for one in found]).tolist(), strict=True))


def expected():
    """Match the sorted chosen values with the sorted rejected values, and compute the loss of each match.

    Equal chosen values are sorted by the places of their pairs in the data set.
    """
    order = sorted(range(6), key=lambda i: (CHOSEN[i], PLACES[i]))
    return {PLACES[i]: np.log1p(np.exp(-(CHOSEN[i] - other))) for i, other in zip(order, sorted(REJECTED), strict=True)}


@pytest.mark.parametrize("parts", [[[[0, 1, 2], [3, 4, 5]]], [[[5, 0], [3]], [[4, 2], [1]]]], ids=["1 rank", "2 ranks"])
def test_ties_are_broken_by_the_place_in_the_data_set(parts):
    got = {place: loss for own in run_ranks(coupled_losses, len(parts), parts=parts) for place, loss in own.items()}
    assert got == pytest.approx(expected(), rel=1e-6)
