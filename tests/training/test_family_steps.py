"""Tests of training steps of every family in fp64: trees on several ranks match padded rows on one rank to 1e-10."""

import pytest

from dpo_engine.model.architecture import FAMILIES
from support.family_cases import CASES, MIXTURES, checkpoint
from support.layouts import assert_same_numbers, assert_same_weights
from support.ranks import run_ranks
from support.trajectory import run_config, train_steps

LAYOUTS = {
    "tp2": ({"tp": 2}, {}),
    "pp2 vpp2": ({"pp": 2, "vpp": 2}, {}),
    "cp2": ({"cp": 2}, {}),
    "tp2, recomputed": ({"tp": 2}, {"recompute": "selective"}),
}
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
EXPERT_LAYOUTS = {
    "dp2 ep2": (2, {"ep": 2}, {}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}, {}),
    "tp2 ep2, recomputed": (2, {"tp": 2, "ep": 2}, {"recompute": "selective"}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}, {}),
    "cp2 ep2, recomputed": (2, {"cp": 2, "ep": 2}, {"recompute": "full"}),
    "tp2 etp2 ep2": (4, {"tp": 2, "etp": 2, "ep": 2}, {}),
}
ALL_LAYOUTS = ("glm4_moe, groups", "deepseek_v3", "gpt_oss")
DEFAULT = (
    ("olmo2", "tp2"),
    ("cohere", "tp2"),
    ("mistral", "cp2"),
    ("qwen3_moe, some layers", "dp2 ep2"),
    ("glm4_moe, groups", "tp2 etp1"),
    ("qwen2_moe", "tp2 ep2, recomputed"),
    ("deepseek_v3", "tp2"),
)


def layouts_of(case):
    """Return the layouts in which a case is tested. Most mixtures are tested in only some of ``EXPERT_LAYOUTS``."""
    if case not in MIXTURES:
        return [*LAYOUTS]
    names = [*EXPERT_LAYOUTS]
    some = {names[(MIXTURES.index(case) + shift) % len(names)] for shift in (0, 3)}
    some |= {layout for one, layout in DEFAULT if one == case}
    some |= set(EXPERT_LAYOUTS) if case == "gpt_oss" else set()
    return sorted(some | (set(LAYOUTS) if case in ALL_LAYOUTS else set()))


def train(start, output, world, parallel, **sections):
    config = run_config(start, output, parallel={"distributed_optimizer": False, **parallel}, **sections)
    return run_ranks(train_steps, world, config=config, sizes=[6, 5], export=str(output), few=3, fp64=True)


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    """Return a function that trains a case with padded rows on one rank, and returns results and exported weights."""
    known = {}

    def compute(case):
        if case not in known:
            folder = tmp_path_factory.mktemp("one")
            known[case] = train(checkpoint(tiny_hf, case), folder, 1, {})[0], folder
        return known[case]

    return compute


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if (case, layout) in DEFAULT else pytest.mark.slow)
        for case in CASES
        for layout in layouts_of(case)
    ],
)
def test_trees_match_padded_rows_on_one_rank(case, layout, expected, tiny_hf, tmp_path):
    one, folder = expected(case)
    world, parallel, model = EXPERT_LAYOUTS.get(layout) or (2, *LAYOUTS[layout])
    for result in train(checkpoint(tiny_hf, case), tmp_path, world, parallel, batch=TREE, model=model):
        assert_same_numbers(result, one, 1e-10)
    untrained = getattr(FAMILIES[CASES[case][0]], "carried", ())
    assert_same_weights(tmp_path, folder, checkpoint(tiny_hf, case), 1e-10, untrained)
