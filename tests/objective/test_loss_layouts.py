"""Tests of every loss in every layout: metrics and the weights after three updates must match those on one rank."""

import pytest

from dpo_engine.config.rules import facts_of
from dpo_engine.config.sections import LossConfig
from dpo_engine.objective.losses import LOSSES
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps

SIZES = [6, 6, 5]
LAYOUTS = {
    "accumulation": (1, {}, 1),
    "dp2": (2, {}, 2),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, 2),
    "cp2 dp2": (4, {"cp": 2}, 2),
}
MIXED = {
    "losses": [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft", "weight": 1.0}]
}
TOKEN_WEIGHTED = {
    "ld_alpha and use_weighting": {"name": "sigmoid", "ld_alpha": 0.3, "use_weighting": True},
    "ld_alpha, coupled": {"name": "aot", "ld_alpha": 0.0},
    "mix, coupled": {"name": "mix", "losses": [{"name": "aot", "weight": 0.7}, {"name": "aot", "beta": 0.3}]},
    "use_weighting without a reference": {"name": "simpo", "use_weighting": True},
}
DEFAULT = {
    **dict.fromkeys(["aot", "ld_alpha and use_weighting"], "tp2 pp2"),
    "mix": "cp2 dp2",
}
"""Losses that cover different code paths, with the layout in which the default suite tests each loss."""
OPTIONS = {"mix": MIXED, "mpo": MIXED, **TOKEN_WEIGHTED}
AMPLIFIED = {"dpop": 1e-4}  # tolerance: dpop multiplies differences of logps near -100 nats by lambda * beta = 5
NAMES = sorted({id(loss): name for name, loss in sorted(LOSSES.items(), reverse=True)}.values())


def sections(name: str, micro_batch_size: int) -> dict:
    """Return the config sections of a run with this loss. The run has a reference model only if the loss needs it."""
    loss = {"name": name, **OPTIONS.get(name, {})}
    facts = facts_of(LossConfig(**loss))
    return {
        "loss": loss,
        "logging": {"entropy": name in TOKEN_WEIGHTED},
        "reference": {"mode": "resident" if facts.needs_reference else "none"},
        "train": {"micro_batch_size": micro_batch_size},
        "optim": {"lr": 1e-4},
    }


@pytest.fixture(scope="module")
def one_rank(tiny_hf, tmp_path_factory):
    """Return a function that trains with a loss on one rank, in one micro-batch per step. The results are cached."""
    known = {}

    def run(name):
        if name not in known:
            out = tmp_path_factory.mktemp("one")
            config = run_config(tiny_hf("llama"), out, **sections(name, 8))
            result = run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(out / "hf"), judged=True)[0]
            known[name] = result, out / "hf"
        return known[name]

    return run


def cases():
    """Yield all combinations of a loss and a layout. The combinations in `DEFAULT` run in the default suite."""
    for name in [*NAMES, *TOKEN_WEIGHTED]:
        for layout in LAYOUTS:
            yield pytest.param(name, layout, marks=() if DEFAULT.get(name) == layout else pytest.mark.slow)


@pytest.mark.parametrize("name, layout", list(cases()))
def test_loss_in_layout_matches_one_rank(name, layout, one_rank, tiny_hf, tmp_path):
    expected, expected_dir = one_rank(name)
    ranks, parallel, micro_batch_size = LAYOUTS[layout]
    config = run_config(tiny_hf("llama"), tmp_path, parallel=parallel, **sections(name, micro_batch_size))
    results = run_ranks(train_steps, ranks, config=config, sizes=SIZES, export=str(tmp_path / "hf"), judged=True)
    assert_same_numbers(results[-1], expected, AMPLIFIED.get(name, 1e-5))
    assert_same_weights(tmp_path / "hf", expected_dir, tiny_hf("llama"), 1e-5)
