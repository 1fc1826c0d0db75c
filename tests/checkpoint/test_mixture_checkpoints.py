"""Tests of checkpoints of mixture-of-experts models, with many distributions of the experts over the ranks.

A run that resumes in the same layout continues bitwise identically. In another layout, the losses and gradient norms
agree within a small tolerance.
"""

import pytest

from checkpoint.test_checkpoint import HALF, SIZES, config_of, run
from dpo_engine.testing.ranks import run_ranks
from support.family_cases import checkpoint

LAYOUTS = {
    "one": (1, {}),
    "one plain": (1, {"distributed_optimizer": False}),
    "dp2 ep2": (2, {"ep": 2}),
    "dp2 ep2 plain": (2, {"ep": 2, "distributed_optimizer": False}),
    "tp2": (2, {"tp": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "tp2 ep2 dp2": (4, {"tp": 2, "ep": 2}),
    "tp2 etp2 ep2": (4, {"tp": 2, "etp": 2, "ep": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
    "tp2 pp2 plain": (4, {"tp": 2, "pp": 2, "distributed_optimizer": False}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("dp2 ep2", "bf16"),
        pytest.param("tp2 etp2 ep2", "fp32", marks=SLOW),
        pytest.param("tp2 ep2 dp2", "bf16", marks=SLOW),
        pytest.param("dp2 ep2 plain", "bf16", marks=SLOW),
        pytest.param("tp2 pp2 plain", "fp32", marks=SLOW),
    ],
)
def test_resume_in_the_same_layout_is_bitwise_identical(name, dtype, tiny_hf, tmp_path):
    ranks, layout = LAYOUTS[name]
    model = checkpoint(tiny_hf, "glm4_moe, groups")
    config = config_of(model, tmp_path, layout, model={"path": str(model), "dtype": dtype})
    expected = run_ranks(run, ranks, config=config, save_at=HALF, folder=str(tmp_path / "c"))
    got = run_ranks(run, ranks, config=config, load_from=HALF, folder=str(tmp_path / "c"))
    assert got[0] == expected[0][HALF:]


@pytest.mark.parametrize(
    "written, read",
    [
        ("tp2", "dp2 ep2"),
        pytest.param("dp2 ep2", "tp2 etp1", marks=SLOW),
        pytest.param("tp2 ep2 dp2", "one plain", marks=SLOW),
        pytest.param("one", "tp2 etp2 ep2", marks=SLOW),
        pytest.param("tp2 etp2 ep2", "pp2 ep2", marks=SLOW),
        pytest.param("pp2 ep2", "dp2 ep2 plain", marks=SLOW),
        pytest.param("dp2 ep2 plain", "tp2 ep2 dp2", marks=SLOW),
        pytest.param("tp2 pp2 plain", "cp2 ep2", marks=SLOW),
        pytest.param("tp2 etp1", "tp2 pp2 plain", marks=SLOW),
    ],
)
def test_resume_in_another_layout(written, read, tiny_hf, tmp_path, case="glm4_moe, groups"):
    model, folder = checkpoint(tiny_hf, case), str(tmp_path / "c")
    (ranks, layout), (ranks_after, layout_after) = LAYOUTS[written], LAYOUTS[read]
    expected = run_ranks(run, ranks, config=config_of(model, tmp_path, layout), save_at=HALF, folder=folder)[0]
    got = run_ranks(run, ranks_after, config=config_of(model, tmp_path, layout_after), load_from=HALF, folder=folder)[0]
    assert len(got) == len(SIZES) - HALF
    for step, want in zip(got, expected[HALF:], strict=True):
        assert step["loss"] == pytest.approx(want["loss"], rel=2e-6)
        assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("written, read", [("tp2 etp2 ep2", "one plain"), ("dp2 ep2 plain", "tp2 etp2 ep2")])
def test_resume_with_biases_of_experts_in_another_layout(written, read, tiny_hf, tmp_path):
    test_resume_in_another_layout(written, read, tiny_hf, tmp_path, case="gpt_oss")
