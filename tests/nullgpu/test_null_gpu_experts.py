"""Tests of experts in Transformer Engine's layers: weights, attributes of weights, waits of the host, and launches."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from runs import HERE, requires_null_gpu, requires_transformer_engine, run
from support.family_cases import CASES

pytestmark = [*requires_null_gpu, requires_transformer_engine]

EXPERTS = 8
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYOUTS = {  # the family; tp, ep and etp; the number of ranks; and the tested rank
    "ep2": ("qwen3_moe", (1, 2, 1), 2, 1),
    "tp2 ep2 etp2": ("qwen3_moe", (2, 2, 2), 4, 3),
    "shared experts tp2 ep2": ("qwen2_moe", (2, 2, 1), 4, 1),
    "dense layer, router bias, shared experts": ("glm4_moe", (1, 2, 1), 2, 0),
}


def held_weights(directory, folder, world, rank, *keys):
    """Run rank_weights.py. Return its report, and the weights by their names in the model."""
    command = [HERE / "nullgpu", sys.executable, HERE / "rank_weights.py", "--model", directory, "--out", folder]
    command += ["--world", str(world), "--rank", str(rank), "model.spec=te", *keys]
    done = subprocess.run(command, env=os.environ | {"NULLGPU_MIB": "81559"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2500:]
    return json.loads((folder / "report.json").read_text()), load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_experts_are_loaded_and_exported(layout, tiny_hf, tmp_path):
    """Compare loaded weights with slices of the checkpoint, and exported tensors with tensors of the checkpoint.

    Also check the attributes on which gradient reduction depends.
    """
    family, (tp, ep, etp), world, rank = LAYOUTS[layout]
    directory = tiny_hf(family, pad_token_id=0, dtype=torch.bfloat16, **CASES[family][1])
    keys = (f"parallel.tp={tp}", f"parallel.ep={ep}", f"parallel.etp={etp}")
    report, weights = held_weights(directory, tmp_path, world, rank, *keys)
    stored, here, part = load_file(directory / "model.safetensors"), EXPERTS // ep, rank % etp
    first = here * (rank // etp % ep)

    expected, tensors = {}, set()
    for layer in range(first_layer := 1 if family == "glm4_moe" else 0, 4):
        for number in range(here):
            names = [f"model.layers.{layer}.mlp.experts.{first + number}.{name}.weight" for name in PROJECTIONS]
            gate, up, down = (stored[name] for name in names)
            module = f"decoder.layers.{layer}.mlp.experts.linear_fc"
            expected[f"{module}1.weight{number}"] = torch.cat([gate.chunk(etp)[part], up.chunk(etp)[part]])
            expected[f"{module}2.weight{number}"] = down.chunk(etp, 1)[part]
            tensors |= set(names)
    experts = {name for name in report if ".mlp.experts." in name}
    assert experts == expected.keys() and len(experts) == (4 - first_layer) * here * 2
    assert all(torch.equal(weights[name], value) for name, value in expected.items())

    for name, facts in report.items():
        mine = name in experts
        assert (facts["allreduce"], facts["summed_over_copies"]) == (not mine, mine), name
        assert facts["sharded"] is not facts["replicated"], name
        assert facts["summed_over_tp"] is (facts["replicated"] and tp > 1), name
        assert all((facts["written"] or {}).values()), facts
    exported = {tensor for name in experts for tensor in report[name]["written"] or ()}
    assert exported == (tensors if etp == 1 else set())
    assert len({facts["table"] for facts in report.values()}) == len(report)


MIXTURE = ("--model", "qwen3_30b_a3b", "--lengths", "64,32,32", "model.spec=te")
STEPS = {
    "tp2 ep2": ("--world", "4", "parallel.tp=2", "parallel.ep=2"),
    "overlap": ("--world", "4", "parallel.ep=2", "parallel.overlap=true"),
    "adapters, trees": ("--world", "2", "parallel.ep=2", "adapter.rank=16", "batch.layout=tree"),
    "recompute": ("--world", "2", "parallel.ep=2", "model.recompute=selective"),
}


@pytest.mark.parametrize("layout", STEPS)
def test_the_host_waits_once_for_each_layer_of_experts(layout):
    """In a layer's forward pass, the host waits for the numbers of tokens per expert.

    If the forward pass is recomputed, the host waits again.
    """
    last = run(*MIXTURE, "--layers", "2", *STEPS[layout])["last"]
    passes = 3 if layout == "recompute" else 2  # one of the reference, and one or two of the policy
    assert last["waits_in_micro_batches"] == 2 * passes * last["micro_batches"], last["phases"]
    assert last["waits_besides"] <= 5, last["phases"]  # 4 as in a dense model, and 1 for the routers' metrics


def test_products_and_launches_of_experts():
    """cuBLAS computes the products of the experts.

    For each matrix of an expert, one kernel adds the matrix's gradient to Megatron's gradient buffer.
    """
    few, many = (run(*MIXTURE, "--layers", layers, *STEPS["tp2 ep2"])["last"] for layers in "24")
    layers, local = 2 * many["micro_batches"], 64
    products = (many["counts"]["products"] - few["counts"]["products"]) / layers
    launches = (many["model_launches"] - few["model_launches"]) / layers
    # Each matrix has one product of the reference, and one forward and two backward products of the policy.
    assert 2 * local * 4 < products <= 2 * local * 4 + 12
    assert 2 * local < launches <= 2 * local + 260
