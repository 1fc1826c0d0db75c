"""Tests of every family: transformers' logits in fp64 in several layouts, bitwise export, and gradients."""

import traceback

import pytest
import torch

from support.family_cases import CASES, MIXTURES, checkpoint, expected_logits
from support.ranks import run_ranks
from support.sharded import open_model, whole_logits

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
TOKENS = torch.randint(515, (2, 24), generator=torch.Generator().manual_seed(5))


def splits_experts(layout):
    return bool({"ep", "etp"} & LAYOUTS[layout][1].keys())


def load_and_save(directories, layout, exports):
    """Return the logits of each case on the ranks that have them; if a case fails, its traceback."""
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    groups, found = None, {}
    for name, directory in directories.items():
        try:
            chunks, arch, groups = open_model(directory, layout, "fp64", groups=groups)
            load_hf(chunks, arch, directory, groups=groups)
            with torch.no_grad():
                logits = whole_logits(chunks, TOKENS, groups)
            found[name] = None if logits is None else logits[..., : arch.vocab_size]
            save_hf(chunks, arch, exports / name, source=directory, groups=groups)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def results(tiny_hf, tmp_path_factory):
    """Return a function that computes all cases in a layout, in one start of the ranks."""
    known = {}

    def compute(layout):
        if layout not in known:
            exports = tmp_path_factory.mktemp("exports")
            world, dims = LAYOUTS[layout]
            directories = {case: checkpoint(tiny_hf, case) for case in (MIXTURES if splits_experts(layout) else CASES)}
            ranks = run_ranks(load_and_save, world, directories=directories, layout=dims, exports=exports)
            known[layout] = ranks[-1], exports
        return known[layout]

    return compute


@pytest.fixture(scope="module")
def expected(tiny_hf):
    known = {}

    def compute(case):
        if case not in known:
            known[case] = expected_logits(checkpoint(tiny_hf, case), TOKENS)
        return known[case]

    return compute


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if layout in DEFAULT else pytest.mark.slow)
        for layout in LAYOUTS
        for case in (MIXTURES if splits_experts(layout) else CASES)
    ],
)
def test_logits_match_transformers_and_export_is_bitwise(case, layout, results, expected, tiny_hf):
    from model.test_weights import assert_same_bits

    got, exports = results(layout)
    assert not isinstance(got[case], str), got[case]
    theirs = expected(case)
    assert (got[case] - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    assert_same_bits(exports / case, checkpoint(tiny_hf, case))
