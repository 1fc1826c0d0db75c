"""Tests of a rank's memory (state, activations, the allocator's reserve), and of the out-of-memory report."""

import re

import pytest

from dpo_engine.errors import LONGEST
from dpo_engine.model.memory import PIECE
from memory_table import CELLS, LEAST, LLAMA_1B, LLAMA_8B, LLAMA_8B_HOST
from runs import GIB, requires_null_gpu, run

pytestmark = requires_null_gpu

LONG = ("--model", "ministral_8b", "--world", "8", "--pairs", "1", "--lengths", "65536,65536,65536")
"""A pair whose rows have 131,072 tokens. In ministral_8b, three of every four layers have windows of 32,768 tokens."""


def activations(report):
    """Return the bytes that the last step needs at its peak in addition to the run's state."""
    return report["last"]["peak"] - report["last"]["after"]


@pytest.mark.parametrize("keys", [("parallel.tp=2",), ("parallel.tp=2", "parallel.cp=2"), ("reference.mode=stored",)])
def test_state_is_what_the_estimate_says(keys):
    report = run(*LLAMA_8B, "--lengths", "64,32,32", *keys)
    assert report["last"]["after"] == pytest.approx(report["expected_constant"], rel=0.01)


def test_peak_is_at_most_the_state_and_the_bound_of_activations():
    """The bound counts the layers' activations in bf16, and the logits of 2 chunks in fp32.

    The activations are residuals, norms, query, key, value, attention, gate, up and gate * up.
    """
    report = run(*LLAMA_8B)
    hidden, ffn, key_value, layers, vocabulary, tokens, chunk = 4096, 14336, 1024, 32, 128256, 2 * 3072, 1024
    layer = 2 * (4 * hidden + 2 * hidden + 2 * key_value + 3 * ffn)
    logits = 2 * 4 * chunk * vocabulary
    bound = report["expected_constant"] + tokens * layers * layer + logits
    assert bound / 2 < report["last"]["peak"] <= 1.02 * bound, (report["last"]["peak"] / GIB, bound / GIB)


OTHERS = [
    (*LLAMA_8B, "optim.gradients=bf16"),
    (*LLAMA_8B, "parallel.pp=2", "--pairs", "8"),
    (*LLAMA_8B, "parallel.pp=2", "--pairs", "8", "--rank", "4"),
    (*LLAMA_8B, "adapter.rank=16"),
    (*LLAMA_8B, "adapter.rank=16", "model.recompute=full"),
    (*LLAMA_8B, "adapter.rank=64", "adapter.kind=dora", "parallel.tp=2"),
    (*LLAMA_8B, "adapter.rank=16", "adapter.targets=[q_proj,v_proj]"),
    ("--model", "llama3_1b", "model.recompute=full"),
    (*LONG, "parallel.cp=8", "reference.mode=stored", "model.recompute=full", "batch.layout=stacked"),
]


@pytest.mark.parametrize("arguments", [*CELLS.values(), *OTHERS], ids=" ".join)
def test_peak_is_what_check_and_plan_estimate(arguments):
    report = run(*arguments)
    assert report["last"]["peak"] == pytest.approx(report["expected_peak"], rel=0.03)


def test_adamw_needs_no_temporary_copy():
    """A run of a 4B model with full recomputation and a stored reference must fit on a GPU with 80 GB."""
    report = run("--model", "qwen3_4b", "model.recompute=full", "reference.mode=stored")
    assert report["last"]["reserved"] <= 74 * GIB
    assert activations(report) < 4 * GIB  # a temporary copy with 4 bytes per parameter would need 15 GiB


def test_states_on_the_host_leave_the_device():
    """The device needs 12 bytes less for each parameter that the rank owns.

    The update processes the parameters in pieces. It needs two additional buffers, and each of them holds one piece in
    fp32. For each piece, the update waits for the gradients and for a free buffer.
    """
    device, host = run(*LLAMA_8B, "reference.mode=stored"), run(*LLAMA_8B_HOST)
    owned = 8_030_261_248 // 8
    saved = device["last"]["after"] - host["last"]["after"]
    assert saved == pytest.approx(12 * owned - 2 * 4 * PIECE, rel=0.01)
    pieces = -(-owned // PIECE) + 1  # matrices and vectors are in different pieces
    counts = [report["last"]["counts"] for report in (device, host)]
    waits, copies = (counts[1][name] - counts[0].get(name, 0) for name in ("event_waits", "copies"))
    assert waits == 2 * pieces
    # Gradients are copied once per piece. Each slice of a weight in a piece is copied separately.
    weights = 32 * 9 + 3
    assert 2 * pieces <= copies <= 2 * pieces + weights, "gradients: one copy per piece; weights: one per slice"


def test_the_start_needs_no_main_weights_on_the_device():
    """While Megatron's DDP copies the weights to its buffer, the device has them twice.

    No later moment of the start needs more memory.
    """
    report = run(*LLAMA_1B, *LEAST, "optim.states=host")
    wrapped = 2 * report["parts"]["weights"] + report["parts"]["gradients"]
    assert report["start_peak"] == pytest.approx(wrapped, rel=0.01)


def test_out_of_memory_reports_the_plan_and_the_changes():
    report = run("--model", "llama3_1b", "--layers", "4", card="12288")
    allocated, planned, change = report["out_of_memory"]
    assert re.match(r"CUDA out of memory. Tried to allocate .* GPU 0 has a total capacity of 12.00 GiB of", allocated)
    parts = {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+) GiB", planned)}
    assert {name: parts[name] for name in ("weights", "gradients", "reference")} == pytest.approx(
        {name: report["parts"][name] / GIB for name in ("weights", "gradients", "reference")}, rel=0.01
    )
    assert change.startswith("to use less memory, set one of reference.mode=stored (")
    assert all(len(line) <= LONGEST for line in report["out_of_memory"]), "longer lines are cut when they are printed"


def test_varied_lengths_leave_little_memory_unused():
    report = run(*LLAMA_8B, "--vary", "--pairs", "8", "--steps", "6", "parallel.tp=2")
    assert report["last"]["reserved"] <= 1.03 * report["last"]["peak"]


def test_recomputing_mlps_halves_activations():
    full = run(*LLAMA_8B, "parallel.tp=2")
    saved = run(*LLAMA_8B, "parallel.tp=2", "model.recompute=selective")
    assert activations(saved) < 0.5 * activations(full)
