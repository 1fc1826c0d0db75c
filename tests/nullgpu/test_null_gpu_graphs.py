"""Tests of ``model.cuda_graphs``: in all layouts, replays take the place of launches, and memory is as estimated.

Nothing is computed. ``tests/training/test_cuda_graphs.py`` compares numbers.
"""

import pytest

from dpo_engine.model.memory import RESERVED
from runs import requires_null_gpu, requires_transformer_engine, run

pytestmark = requires_null_gpu

LAYERS = 4
SHAPE = ("--model", "llama3_8b", "--layers", str(LAYERS), "batch.layout=tree", "--steps", "3")
SHORT = (*SHAPE, "--lengths", "250,120,101", "--pairs", "4", "--vary", "train.micro_batch_size=2")
ON = "model.cuda_graphs=true"
ROWS = (*SHAPE, "--lengths", "2,2048,2048", "--pairs", "2")
"""Rows of 4,098 tokens. The estimate assumes 4,100 tokens, because it counts the prompt once for each response."""

CASES = {  # the keys, and the number of layers with recordings
    "one rank": ((), LAYERS - 1),
    "tp2": (("--world", "2", "parallel.tp=2"), LAYERS - 1),
    "tp2 without sequence parallelism": (
        ("--world", "2", "parallel.tp=2", "parallel.sequence_parallel=false"),
        LAYERS - 1,
    ),
    "cp2": (("--world", "2", "parallel.cp=2"), LAYERS - 1),
    "dp2": (("--world", "2", "parallel.overlap=true"), LAYERS - 1),
    "first stage": (("--world", "2", "parallel.pp=2"), LAYERS // 2),
    "last stage": (("--world", "2", "parallel.pp=2", "--rank", "1"), LAYERS // 2 - 1),
    "interleaved": (("--world", "2", "parallel.pp=2", "parallel.vpp=2"), LAYERS // 2),
    "adapters": (("adapter.rank=16",), LAYERS - 1),
    "stored reference": (("reference.mode=stored",), LAYERS - 1),
    "offloaded reference": (("reference.mode=offloaded", "reference.ahead=1"), LAYERS - 1),
    "states on the host": (("optim.states=host", "--world", "8"), LAYERS - 1),
}
TE_CASES = {
    "te": (("model.spec=te",), LAYERS - 1),
    "te tp2": (("model.spec=te", "--world", "2", "parallel.tp=2"), LAYERS - 1),
    "te adapters": (("model.spec=te", "adapter.kind=dora"), LAYERS - 1),
}


def check_replays(keys, layers):
    plain, graphs = run(*SHORT, *keys)["steps"], run(*SHORT, *keys, ON)["steps"]
    assert graphs[0]["counts"]["graphs"] == 0, "the first step is not recorded"
    for step in graphs[1:]:
        counts, before = step["counts"], plain[-1]["counts"]
        assert counts["graphs"] == 4 * layers * step["micro_batches"], "two forward and two backward pieces in a layer"
        assert counts["stray"] == 0, "every launch during a recording is recorded"
        # A layer has four linear layers: two in attention and two in the MLP. Each one has one product in the forward
        # pass, and one in the backward pass for the gradient of its input. If its weight is trained, the backward pass
        # has one more product for the gradient of the weight.
        assert before["products"] - counts["products"] >= 8 * layers * step["micro_batches"]
        assert before["launches"] - counts["launches"] > 8 * layers * step["micro_batches"]
    waits = "waits_in_micro_batches"  # in the second step, the host waits while torch's cache is emptied
    assert graphs[2][waits] == plain[2][waits]
    assert graphs[1]["counts"]["captured"] > 0 == graphs[2]["counts"]["captured"]


@pytest.mark.parametrize("name", CASES)
def test_replays_take_the_place_of_launches(name):
    check_replays(*CASES[name])


@requires_transformer_engine
@pytest.mark.parametrize("name", TE_CASES)
def test_replays_with_transformer_engine(name):
    check_replays(*TE_CASES[name])


def test_collectives_are_recorded():
    keys = (*SHORT, "--world", "2", "parallel.tp=2")
    plain, graphs = run(*keys)["last"], run(*keys, ON)["last"]
    layers = (LAYERS - 1) * graphs["micro_batches"]
    # A layer's forward pass has two gathers and two sums. Its backward pass has the same collectives, and gathers the
    # inputs once more for the gradients of two weights.
    assert plain["counts"]["collectives"] - graphs["counts"]["collectives"] == layers * (4 + 4 + 2)


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("--world", "4", "parallel.tp=4"),
        ("--world", "2", "parallel.cp=2"),
        ("--world", "2", "parallel.pp=2", "--pairs", "4"),
        ("--world", "2", "parallel.pp=2", "--pairs", "4", "--rank", "1"),
        ("--world", "2", "parallel.pp=2", "parallel.vpp=2", "--pairs", "4"),
        ("adapter.rank=16",),
        ("optim.gradients=bf16", "--world", "4"),
    ],
    ids=" ".join,
)
def test_peak_is_what_the_estimate_says(keys):
    """Memory of intermediate results is reserved for the next replay, but torch does not count it as allocated."""
    report = run(*ROWS, "--layers", "8", *keys, ON)
    step, expected = report["last"], report["expected_peak"]
    assert 0.95 * expected <= step["peak"] <= 1.03 * expected
    assert step["reserved"] <= 1.04 * RESERVED * expected


def test_memory_of_the_first_step_is_used_again():
    """After the first step, torch's cache holds the memory of that step's activations.

    If the cache were not emptied, the recordings would reserve additional memory for activations.
    """
    report = run(*ROWS, "--layers", "8", "adapter.rank=16", ON)["last"]
    assert report["reserved"] <= 1.15 * report["peak"]
