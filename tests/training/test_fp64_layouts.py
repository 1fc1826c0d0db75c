"""Tests of parallel layouts in fp64, and a test that compares fp32 with fp64.

In every layout, a run must give the same metrics and weights as a run with padded rows on one rank, to within 1e-10.
"""

import pytest

from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from support.layouts import LAYOUTS, SIZES, world

PLAIN = {"distributed_optimizer": False}
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
SLOW = ("one", "tp2", "pp2", "cp2", "dp2", "tp2 pp2 cp2")
"""Layouts that `test_layout_matches_one_rank` tests only in the slow suite.

These are the largest layout, the layout without parallelism, and layouts whose kinds of parallelism also occur in
layouts that are tested outside the slow suite.
"""
CASES = [
    pytest.param(name, rows, marks=pytest.mark.slow if name in SLOW else ())
    for name in LAYOUTS
    for rows in ("stacked", "tree")
    if (name, rows) != ("one", "stacked")
]


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    """Return a function that trains with a given loss and padded rows on one rank.

    The function trains only once for each loss. It returns the trajectory and the directory of the exported weights.
    """
    known = {}

    def run(loss):
        if loss not in known:
            out = tmp_path_factory.mktemp("one")
            config = run_config(tiny_hf("llama"), out, parallel=PLAIN, loss={"name": loss})
            known[loss] = run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(out), few=3, fp64=True), out
        return known[loss]

    return run


def check(expected, tiny_hf, out, name, rows, loss):
    results, one = expected(loss)
    batch = TREE if rows == "tree" else {}
    config = run_config(tiny_hf("llama"), out, parallel=LAYOUTS[name] | PLAIN, batch=batch, loss={"name": loss})
    ranks = world(name, LAYOUTS[name])
    for result in run_ranks(train_steps, ranks, config=config, sizes=SIZES, export=str(out), few=3, fp64=True):
        assert_same_numbers(result, results[0], 1e-10)
    assert_same_weights(out, one, tiny_hf("llama"), 1e-10)


@pytest.mark.parametrize("name, rows", CASES)
def test_layout_matches_one_rank(name, rows, expected, tiny_hf, tmp_path):
    check(expected, tiny_hf, tmp_path, name, rows, "sigmoid")


def test_fp32_matches_fp64_up_to_rounding(expected, tiny_hf, tmp_path):
    """The code that runs only in fp64, such as the fp64 optimizer, must agree with the code that runs in fp32."""
    results, one = expected("sigmoid")
    config = run_config(tiny_hf("llama"), tmp_path)
    (got,) = run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(tmp_path), few=3)
    assert_same_numbers(got, results[0], 1e-5)
    assert_same_weights(tmp_path, one, tiny_hf("llama"), 1e-5)


def test_loss_that_couples_pairs(expected, tiny_hf, tmp_path):
    check(expected, tiny_hf, tmp_path, "cp2 dp2", "tree", "aot")
