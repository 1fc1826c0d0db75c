"""Tests of FP8 linear layers of Transformer Engine: products, weights, waits, memory, and recipes that are refused.

Transformer Engine's own checks of shapes, types and the GPU are active. Nothing is computed, so numbers cannot be
compared.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from runs import GIB, HERE, requires_null_gpu, requires_transformer_engine, run

pytestmark = [*requires_null_gpu, requires_transformer_engine]

LAYERS, LINEARS = 2, 4
SHAPE = ("--model", "llama3_8b", "--layers", str(LAYERS), "--lengths", "250,120,101", "model.spec=te")
E4M3, HYBRID = (f"megatron.transformer.fp8={name}" for name in ("e4m3", "hybrid"))
RECIPE = "megatron.transformer.fp8_recipe"
BLOCKWISE, TENSORWISE = (E4M3, f"{RECIPE}=blockwise"), (HYBRID, f"{RECIPE}=tensorwise")
MXFP8 = (E4M3, f"{RECIPE}=mxfp8")
TP2, PP2 = ("--world", "2", "parallel.tp=2"), ("--world", "2", "--pairs", "4", "parallel.pp=2")
ALL = 4 * LINEARS * LAYERS
"""Products of a micro-batch. Each linear layer has one in the reference's forward pass, one in the policy's forward
pass, and two in the policy's backward pass."""
MLP = 2 * LAYERS
"""Additional products of a micro-batch if the MLPs are recomputed."""
FROZEN = (3 * LINEARS - 1) * LAYERS + LAYERS - 1
"""Products of a micro-batch if base weights have no gradients. The gradient of the first layer's input is not computed
either."""

CASES = {  # the keys, the GPU's compute capability, and the FP8 products of a micro-batch
    "tensorwise tp2": ((*TENSORWISE, *TP2), 90, ALL),
    "blockwise tp2": ((*BLOCKWISE, *TP2), 90, ALL),
    "mxfp8 tp2": ((*MXFP8, *TP2), 100, ALL),
    "tensorwise on a newer GPU": (TENSORWISE, 100, ALL),
    "trees tp2 cp2": ((*BLOCKWISE, "--world", "4", "parallel.tp=2", "parallel.cp=2", "batch.layout=tree"), 90, ALL),
    "mxfp8 trees": ((*MXFP8, "batch.layout=tree"), 100, ALL),
    "first stage": ((*BLOCKWISE, *PP2), 90, ALL // 2),
    "interleaved": ((*BLOCKWISE, *PP2, "parallel.vpp=2", "--layers", "4"), 90, ALL),
    "recompute mlp": ((*BLOCKWISE, *TP2, "model.recompute=selective"), 90, ALL + MLP),
    "recompute full": ((*TENSORWISE, *TP2, "model.recompute=full"), 90, ALL + LINEARS * LAYERS),
    "recompute trees": ((*BLOCKWISE, *TP2, "model.recompute=full", "batch.layout=tree"), 90, ALL + LINEARS * LAYERS),
    "recompute adapters": (
        (*BLOCKWISE, "model.recompute=full", "adapter.rank=16"),
        90,
        FROZEN + LINEARS * LAYERS + 1,  # recomputed layers always compute the gradient of their input
    ),
    "overlap": ((*BLOCKWISE, "--world", "2", "parallel.overlap=true"), 90, ALL),
    "two layers in bf16": (
        (*BLOCKWISE, "--layers", "4", "megatron.transformer.first_last_layers_bf16=true", "model.recompute=selective"),
        90,
        ALL + MLP,
    ),
    "stored reference": ((*BLOCKWISE, "reference.mode=stored"), 90, ALL * 3 // 4),
    "adapters": ((*BLOCKWISE, *TP2, "adapter.rank=16"), 90, FROZEN),
    "adapters trees": ((*TENSORWISE, *TP2, "adapter.kind=dora", "batch.layout=tree"), 90, FROZEN),
}
WEIGHTS = "quantize_transpose_square_blockwise"
"""Part of the name of the kernel that rounds a weight to FP8, in blocks of 128 x 128 numbers."""


@pytest.mark.parametrize("name", CASES)
def test_linear_layers_compute_in_fp8(name):
    keys, capability, products = CASES[name]
    last = run(*SHAPE, *keys, capability=capability)["last"]
    assert last["counts"]["fp8_products"] == products * last["micro_batches"]
    assert last["waits_in_micro_batches"] == 0, last["phases"]
    assert last["waits_besides"] <= 4, last["phases"]


def test_no_other_product_is_in_fp8():
    """A run without FP8 has no FP8 products. A run with FP8 also has other products, such as those of the output layer.

    Both runs have the same number of products.
    """
    plain, fp8 = (run(*SHAPE, *TP2, *keys)["last"]["counts"] for keys in ((), BLOCKWISE))
    assert plain["fp8_products"] == 0
    assert plain["products"] == fp8["products"] > fp8["fp8_products"] > 0


@pytest.mark.parametrize("mode", [(), ("reference.mode=offloaded", "reference.ahead=1")], ids=" ".join)
@pytest.mark.parametrize("layout", [(), PP2, (*PP2, "parallel.vpp=2", "--layers", "4")], ids=" ".join)
def test_each_pass_rounds_the_weights_once(layout, mode):
    """In each step, the reference makes one pass over all micro-batches, and so does the policy.

    Weights can change between passes: the optimizer updates them, or the reference's weights are loaded. Weights do not
    change between the micro-batches of a pass.
    """
    report = run(*SHAPE, *layout, *BLOCKWISE, *mode, "--steps", "3")
    layers = 1 if layout == PP2 else LAYERS
    for figures in report["steps"]:
        assert figures["micro_batches"] > 1
        rounded = sum(calls for kernel, calls in figures["kernels"].items() if WEIGHTS in kernel)
        assert rounded == 2 * LINEARS * layers, figures["kernels"]


def test_memory():
    """The estimate includes the weights' FP8 copies. It is too high, because it assumes bf16 activations."""
    gib = {}
    for name, keys in {"bf16": (), "tensorwise": TENSORWISE, "blockwise": BLOCKWISE}.items():
        report = run("--model", "llama3_8b", "--world", "8", "model.spec=te", "parallel.tp=2", *keys)
        measured = report["last"]["peak"] / report["expected_peak"]
        assert (0.96 if keys else 0.99) < measured < (1.0 if keys else 1.01), name
        gib[name] = report["last"]["peak"] / GIB
    assert gib["bf16"] < gib["tensorwise"] < gib["bf16"] + 10


MIXTURE = ("--model", "qwen3_30b_a3b", "--layers", "2", "--lengths", "64,32,32", "model.spec=te", "parallel.ep=2")
LOCAL = 64


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_experts(recompute):
    """Megatron pads the tokens of each expert. The host waits once in each layer's forward pass, as without FP8."""
    last = run(*MIXTURE, "--world", "4", "parallel.tp=2", *BLOCKWISE, f"model.recompute={recompute}")["last"]
    passes = 5 if recompute == "selective" else 4
    products = LAYERS * (4 * 2 + passes * 2 * LOCAL)
    assert last["counts"]["fp8_products"] == products * last["micro_batches"]
    assert last["waits_in_micro_batches"] == LAYERS * (passes - 2) * last["micro_batches"]
    assert last["waits_besides"] <= 5, last["phases"]


def test_weights_are_loaded_and_exported_as_without_fp8(tiny_hf, tmp_path):
    directory, found = tiny_hf("llama", pad_token_id=0, dtype=torch.bfloat16), {}
    for name, keys in {"bf16": (), "fp8": BLOCKWISE}.items():
        (tmp_path / name).mkdir()
        command = [HERE / "nullgpu", sys.executable, HERE / "rank_weights.py", "--model", directory]
        command += ["--out", tmp_path / name, "--world", "2", "--rank", "1", "model.spec=te", "parallel.tp=2", *keys]
        done = subprocess.run(command, env=os.environ | {"NULLGPU_MIB": "81559"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2500:]
        report = json.loads((tmp_path / name / "report.json").read_text())
        found[name] = report, load_file(tmp_path / name / "weights.safetensors")
    assert found["bf16"][0] == found["fp8"][0]
    assert found["bf16"][1].keys() == found["fp8"][1].keys()
    for name, weight in found["bf16"][1].items():
        assert torch.equal(weight, found["fp8"][1][name]), name


REFUSED = {
    80: (
        BLOCKWISE,
        "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9; use a GPU and a version of",
    ),
    90: (MXFP8, "Device compute capability 10.0 or higher required for MXFP8 execution; use blockwise or tensorwise"),
    100: (
        BLOCKWISE,
        "Transformer Engine would convert blockwise scales to mxfp8 scales in every matrix product; use mxfp8 or",
    ),
}


@pytest.mark.parametrize("capability", REFUSED)
def test_recipes_that_the_gpu_does_not_have(capability):
    keys, why = REFUSED[capability]
    command = [HERE / "nullgpu", sys.executable, HERE / "one_rank.py", *SHAPE, *keys]
    environment = os.environ | {"NULLGPU_MIB": "81559", "NULLGPU_SM": str(capability)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"cannot be used here: {why}" in done.stderr
