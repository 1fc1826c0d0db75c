"""Tests of fp64 training steps of every family.

The numbers in several layouts must match those on one rank. For dense models, the numbers on two tensor-parallel ranks
must match those of transformers.
"""

import pytest

from dpo_engine.testing import check_layouts, check_steps
from support.family_cases import CASES, MIXTURES

LAYOUTS = {
    "tp2": ({"tp": 2}, {}),
    "pp2 vpp2": ({"pp": 2, "vpp": 2}, {}),
    "cp2": ({"cp": 2}, {}),
    "tp2, recomputed": ({"tp": 2}, {"recompute": "selective"}),
}
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
    ("mistral", "cp2"),
    ("qwen3_moe, some layers", "dp2 ep2"),
    ("deepseek_v3", "tp2"),
)
ALSO = (("glm4_moe, groups", "tp2 etp1"), ("qwen2_moe", "tp2 ep2, recomputed"))


def layouts_of(case):
    """Return the layouts in which a case is tested.

    Dense models are tested in ``LAYOUTS``. Mixtures of experts are tested in some of ``EXPERT_LAYOUTS``, but gpt_oss is
    tested in all of them. The mixtures in ``ALL_LAYOUTS`` are also tested in ``LAYOUTS``.
    """
    if case not in MIXTURES:
        return [*LAYOUTS]
    names = [*EXPERT_LAYOUTS]
    some = {names[(MIXTURES.index(case) + shift) % len(names)] for shift in (0, 3)}
    some |= {layout for one, layout in DEFAULT + ALSO if one == case}
    some |= set(EXPERT_LAYOUTS) if case == "gpt_oss" else set()
    return sorted(some | (set(LAYOUTS) if case in ALL_LAYOUTS else set()))


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if (case, layout) in DEFAULT else pytest.mark.slow)
        for case in CASES
        for layout in layouts_of(case)
    ],
)
def test_trees_match_padded_rows_on_one_rank(case, layout, tiny_models):
    ranks, parallel, model = EXPERT_LAYOUTS.get(layout) or (2, *LAYOUTS[layout])
    check_layouts(tiny_models, case, parallel, ranks, **model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in MIXTURES])
def test_steps_match_transformers_and_autograd(case, tiny_models):
    """``tests/training/test_mixture_steps.py`` has the same test for mixtures."""
    check_steps(tiny_models, case)
