"""Tests of every family in several layouts.

The fp64 logits must match those of transformers, and exports must be bitwise equal to the loaded checkpoints.
"""

import pytest

from dpo_engine.testing import check_export, check_logits
from support.family_cases import CASES, MIXTURES

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "one": (1, {}),
    "cp2": (2, {"cp": 2}),
    "tp2 cp2": (4, {"tp": 2, "cp": 2}),
    "tp4": (4, {"tp": 4}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "tp2 etp2 ep2": (4, {"tp": 2, "etp": 2, "ep": 2}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}),
    "ep4": (4, {"ep": 4}),
}
DEFAULT = ("tp2", "pp2 vpp2", "tp2 ep2")


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if layout in DEFAULT else pytest.mark.slow)
        for layout in LAYOUTS
        for case in (MIXTURES if {"ep", "etp"} & LAYOUTS[layout][1].keys() else CASES)
    ],
)
def test_logits_match_transformers_and_export_is_bitwise(case, layout, tiny_models):
    ranks, dims = LAYOUTS[layout]
    check_logits(tiny_models, case, dims, ranks)
    check_export(tiny_models, case, dims, ranks)
