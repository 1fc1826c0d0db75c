"""Tests of the sources of the reference's log-probabilities, on one rank, without a language model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_engine.scoring import reference as references
from dpo_engine.scoring.reference import HostWeights, OffloadedReference, ResidentReference, StoredReference, exact
from dpo_engine.scoring.store import VALUES, Rows, keys

DIGESTS = np.arange(8, dtype=np.int64).reshape(4, 2) + 1
LAST = SimpleNamespace(last_stage=True, share_experts=False)


def batch_of(*rows):
    """Return a micro-batch of pairs. Each argument is a pair's index in ``DIGESTS``, or -1 for a dummy pair."""
    digest = torch.stack([torch.from_numpy(DIGESTS[row]) if row >= 0 else torch.zeros(2).long() for row in rows])
    counts = torch.ones(len(rows))
    return SimpleNamespace(
        digest=digest, index=torch.tensor(rows), weights=counts, chosen_tokens=counts, rejected_tokens=counts
    )


class TestStored:
    values = np.arange(4 * len(VALUES), dtype=np.float32).reshape(4, -1)

    def test_stored_rows_match_their_pairs_and_dummies_are_zero(self):
        reference = StoredReference(Rows.empty().with_more(keys(DIGESTS), self.values), groups=LAST)
        (logps,) = reference.logps([batch_of(2, -1, 0)])
        assert logps.chosen.tolist() == [self.values[2, 0], 0, self.values[0, 0]]
        assert logps.rejected.tolist() == [self.values[2, 1], 0, self.values[0, 1]]

    def test_missing_pair_is_an_error(self):
        reference = StoredReference(Rows.empty().with_more(keys(DIGESTS[:2]), self.values[:2]), groups=LAST)
        with pytest.raises(KeyError, match="pairs without stored log-probabilities in a batch: 2"):
            reference.logps([batch_of(0, 2, -1, 3)])


def test_policy_is_restored_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    weights, start = HostWeights([model], pinned=False), model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    expected = model.weight.clone()
    with pytest.raises(ZeroDivisionError), weights.on_device() as (chunk,):
        assert torch.equal(chunk.weight, start)
        1 / 0  # noqa: B018
    assert torch.equal(model.weight, expected)


def test_offloaded_results_belong_to_their_pairs(monkeypatch):
    """Each step gets the results of its own pairs, even if the order of the steps differs from that of ``upcoming``."""
    monkeypatch.setattr(references, "score", lambda chunks, batches, **_: [batch.index.tolist() for batch in batches])
    weights = HostWeights([torch.nn.Linear(2, 2)], pinned=False)
    upcoming = [[batch_of(0, 1)], [batch_of(2)], [batch_of(3)]]
    reference = OffloadedReference(weights, lambda: upcoming, vocab_size=8, groups=LAST)
    for rows in ((0, 1), (3,), (2,)):
        assert reference.logps([batch_of(*rows)]) == [list(rows)]


def test_moving_bf16_reference_keeps_small_updates():
    """Each of fifty updates moves the weights by 5% of their distance to the target.

    If the weights were kept only in bf16, the weights would stop changing.
    """
    start, end = (torch.nn.Linear(8, 8, bias=False).bfloat16() for _ in range(2))
    first, target = (module.weight.detach().double() for module in (start, end))
    first, target = first.clone(), target.clone()
    reference = ResidentReference([start], vocab_size=8, groups=LAST)
    for _ in range(50):
        reference.follow([end], 0.05)
    expected = target + (first - target) * 0.95**50
    assert reference.age == 50
    torch.testing.assert_close(start.weight.double(), expected.bfloat16().double(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(exact(start.weight).double(), expected, rtol=1e-4, atol=1e-6)
