"""Tests of training steps of mixtures of experts in fp64, against transformers' models and torch's autograd."""

import pytest

from support.family_cases import MIXTURES, checkpoint, wide, wide_model
from support.hf_training import train_with_transformers
from support.ranks import run_ranks
from support.trajectory import load_weights, run_config, train_steps

SIZES = [4, 4, 3]
LR, DECAY, CLIP, EPS = 3e-4, 0.01, 1.0, 1e-6
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
LAYOUTS = {
    "dp2 ep2": (2, {"ep": 2}, TREE),
    "tp2 pp2 ep2": (4, {"tp": 2, "pp": 2, "ep": 2}, {}),
}
DEFAULT = ("qwen3_moe, some layers", "dp2 ep2"), ("glm4_moe", "dp2 ep2")


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    """Return a function that trains a case with transformers: gradient norms, and the directory of the weights."""
    known = {}

    def compute(case):
        if case not in known:
            policy, reference = (wide_model(checkpoint(tiny_hf, case), 32) for _ in range(2))
            models, settings = [reference, policy], {"decay": DECAY, "clip": CLIP, "lr": LR, "eps": EPS}
            with wide():
                norms, _ = train_with_transformers(case, SIZES, load=lambda case: models.pop(), **settings)
            folder = tmp_path_factory.mktemp("hf")
            policy.save_pretrained(folder)  # with a tensor for each expert, unlike the model in memory
            known[case] = norms, folder
        return known[case]

    return compute


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if (case, layout) in DEFAULT else pytest.mark.slow)
        for case in MIXTURES
        for layout in LAYOUTS
    ],
)
def test_steps_match_transformers_and_autograd(case, layout, expected, tiny_hf, tmp_path):
    norms, folder = expected(case)
    world, parallel, batch = LAYOUTS[layout]
    config = run_config(
        checkpoint(tiny_hf, case),
        tmp_path,
        parallel={"distributed_optimizer": False, **parallel},
        batch=batch,
        optim={"lr": LR, "clip_grad": CLIP, "weight_decay": DECAY, "eps": EPS},
    )
    result = run_ranks(train_steps, world, config=config, sizes=SIZES, export=str(tmp_path), fp64=True)[0]
    assert [step["grad_norm"] for step in result["steps"]] == pytest.approx(norms, rel=1e-10)
    got, want, start = (load_weights(part) for part in (tmp_path, folder, checkpoint(tiny_hf, case)))
    assert got.keys() == want.keys()
    for name, value in want.items():
        moved = (value - start[name]).norm()
        assert (got[name] - value).norm() <= 1e-8 * moved + 1e-13 * value.norm(), name
