"""Tests of the metrics of a loss's terms, of `num_zeros_in_grad`, and of the counts of pairs and epochs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_engine.batching.plan import Plan, Position
from dpo_engine.objective.losses import LOSSES, PairLogps
from dpo_engine.testing.pairs import RandomPairs, global_batches
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config, train_steps
from dpo_engine.training.metrics import means
from dpo_engine.training.objective import BatchFacts, Objective
from dpo_engine.training.start import pairs_seen

CHOSEN, REJECTED, LENGTHS = [-4.0, -9.0, -1.0, 0.0], [-6.0, -7.0, -3.0, 0.0], [2.0, 3.0, 5.0, 0.0]
REFERENCE, WEIGHTS = [-5.0, -8.0, -2.0, 0.0], [0.5, 2.0, 1.0, 0.0]
MIXED = [{"name": "sigmoid", "weight": 0.8}, {"name": "sft", "nll": "sum"}, {"name": "sigmoid", "beta": 1.0}]
AOT = [{"name": "aot_unpaired", "weight": 0.5, "beta": 1.0}, {"name": "sft", "nll": "sum", "weight": 2.0}]


def softplus(x):
    return math.log1p(math.exp(x))


def metrics_of(name, options, coupled=False, **objective):
    """Return the metrics of the pairs above, as one micro-batch. The last pair is a dummy."""
    loss = Objective(LOSSES[name], options, **objective)
    lengths = [torch.tensor(LENGTHS)] * 2
    policy = PairLogps(torch.tensor(CHOSEN), torch.tensor(REJECTED), *lengths, *[torch.ones(4)] * 6)
    reference = PairLogps(*[torch.tensor(REFERENCE)] * 2, *lengths) if loss.facts.needs_reference else None
    columns = dict.fromkeys(("margins", "chosen_rewards", "rejected_rewards"), torch.zeros(4))
    batch = SimpleNamespace(weights=torch.tensor(WEIGHTS), source=torch.zeros(4, dtype=torch.long), **columns)
    known = BatchFacts(sum(WEIGHTS), 3.0)
    data = loss.data(batch, known)
    if coupled:
        groups = SimpleNamespace(dp=torch.distributed.group.WORLD)
        losses = loss.couple([policy], reference and [reference], [data], [torch.arange(4)], groups)[0]
    else:
        losses = loss.losses(policy, reference, data)
    sums = loss.sums(losses, policy, reference, batch, known)
    return means(sums, loss.reported(known, reference=reference is not None), sum(WEIGHTS))


def mean(values):
    return sum(w * v for w, v in zip(WEIGHTS, values, strict=False)) / sum(WEIGHTS)


def test_terms_of_a_mixed_loss():
    got = metrics_of("mix", {"losses": MIXED})
    margins = [c - r for c, r in zip(CHOSEN, REJECTED, strict=True)][:3]
    expected = {
        "loss/sigmoid": mean([0.8 * softplus(-0.1 * m) for m in margins]),
        "loss/sft": mean([-c for c in CHOSEN]),
        "loss/sigmoid_2": mean([softplus(-m) for m in margins]),
    }
    terms = {name: value for name, value in got.items() if name.startswith("loss/")}
    assert terms == pytest.approx(expected, rel=1e-6)
    assert sum(terms.values()) == pytest.approx(got["loss"], rel=1e-6)


def test_terms_of_a_coupled_loss():
    (got,) = run_ranks(metrics_of, 1, name="mix", options={"losses": AOT}, coupled=True)
    # A pair of weight w counts as 2w copies of a pair of weight 1/2. The loss sorts the log-ratios of the chosen
    # responses of all copies, and those of the rejected responses. Then it compares the two sorted lists.
    above, below = (
        sorted(v - r for v, r, w in zip(column, REFERENCE, WEIGHTS, strict=True) for _ in range(int(2 * w)))
        for column in (CHOSEN, REJECTED)
    )
    aot = sum(softplus(b - a) for a, b in zip(above, below, strict=True)) / len(above)
    assert got["loss/aot_unpaired"] == pytest.approx(0.5 * aot, rel=1e-6)
    assert got["loss/sft"] == pytest.approx(2 * mean([-c for c in CHOSEN]), rel=1e-6)
    assert got["loss/aot_unpaired"] + got["loss/sft"] == pytest.approx(got["loss"], rel=1e-6)


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_terms_of_losses_with_a_likelihood(name, weighting):
    got = metrics_of(name, {"nll": "response_mean"}, use_weighting=weighting)
    nll = [-c / n for c, n in zip(CHOSEN, LENGTHS, strict=True) if n]
    # With use_weighting, each response has the factor exp((log p + H) / tokens). The factor of a pair is the product of
    # the factors of its two responses. Both log p and the collision entropy H are sums over the response's tokens. H is
    # 1 nat in this test.
    factors = [math.exp((c + 1) / n + (r + 1) / n) for c, r, n in zip(CHOSEN, REJECTED, LENGTHS, strict=True) if n]
    factors = factors if weighting else [1.0] * 3
    assert got["loss/likelihood"] == pytest.approx(mean([f * v for f, v in zip(factors, nll, strict=True)]), rel=1e-5)
    assert got["loss/preference"] + got["loss/likelihood"] == pytest.approx(got["loss"], rel=1e-6)
    assert got["loss/preference"] > 0


def test_a_single_term_is_not_reported():
    assert not [name for name in metrics_of("sigmoid", {}) if name.startswith("loss/")]
    assert not [name for name in metrics_of("cpo", {"nll_weight": 0.0}) if name.startswith("loss/")]


LAYOUTS = {
    "one": (1, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "distributed_optimizer": False}),
    "dp2 tp2": (4, {"tp": 2, "distributed_optimizer": True}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tp2 pp2" else pytest.mark.slow) for name in LAYOUTS]
)
def test_zeros_are_those_of_tokens_that_no_prediction_uses(name, tied, tiny_hf, tmp_path):
    """In a dense, untied model, gradients are exactly 0 only in embedding rows of tokens that no prediction uses.

    No prediction uses the last token of a sequence. This token is always EOS, which occurs nowhere else, so the
    embedding row of EOS has zero gradients.
    """
    ranks, parallel = LAYOUTS[name]
    model = tiny_hf("llama", tie_word_embeddings=tied)
    config = run_config(model, tmp_path, parallel=parallel, logging={"num_zeros": True})
    results = run_ranks(train_steps, ranks, config=config, sizes=[6])
    (indices,) = global_batches([6])
    pairs = RandomPairs(6, VOCAB)
    rows = [np.concatenate([pair.prompt, part]) for pair in map(pairs.__getitem__, indices) for part in pair[1:3]]
    read = {int(token) for row in rows for token in row[:-1]}
    hidden = 0 if tied else len(read)  # with tied weights, all rows are used by the output layer and have gradients
    expected = 0 if tied else (VOCAB - hidden) * 64
    assert [step["num_zeros_in_grad"] for result in results for step in result["steps"]] == [expected] * ranks


def test_epochs_and_pairs_before_a_checkpoint():
    plan = Plan(RandomPairs(10, VOCAB), global_batch_size=4, epochs=2)
    assert [float(plan.epochs_done(step)) for step in range(7)] == [0.0, 0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    manifest = {"identity": {"train_data": {"pairs": 10}}, "run": {"position": Position(4, 1, 4)._asdict()}}
    assert pairs_seen(manifest) == 14
    assert pairs_seen({**manifest, "run": {**manifest["run"], "pairs_seen": 99}}) == 99
