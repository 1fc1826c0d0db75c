"""Tests of ``tp_comm_overlap`` with Transformer Engine: its kernels replace NCCL's collectives, in all layouts.

Transformer Engine's own size checks are active. Nothing is computed or communicated, so numbers cannot be compared.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest

from runs import HERE, requires_null_gpu, requires_transformer_engine, run

pytestmark = [*requires_null_gpu, requires_transformer_engine]

LAYERS = 3
SHAPE = ("--model", "llama3_8b", "--layers", str(LAYERS), "--lengths", "250,120,101", "model.spec=te")
VARIED = ("--pairs", "4", "--vary", "--steps", "3", "batch.layout=tree", "train.micro_batch_size=2")
ON = "megatron.transformer.tp_comm_overlap=true"
TENSORWISE = ("megatron.transformer.fp8=hybrid", "megatron.transformer.fp8_recipe=tensorwise")
MXFP8 = ("megatron.transformer.fp8=e4m3", "megatron.transformer.fp8_recipe=mxfp8")
SOME_IN_BF16 = "megatron.transformer.first_last_layers_bf16=true"
HIDDEN = 4096
SPLITS = 4
"""Number of pieces into which Transformer Engine cuts a product whose output is summed over ranks."""


def layout(**sizes):
    world = 1
    for size in sizes.values():
        world *= size
    return ("--world", str(world), *(f"parallel.{name}={size}" for name, size in sizes.items()))


def steps(*keys):
    """Return the steps of a run with varied lengths, and the number of tokens to which each row is padded."""
    report = run(*SHAPE, *VARIED, *keys, capability=100 if MXFP8[1] in keys else 90)
    (line,) = [line for line in report["chosen"] if line.startswith("rows: all padded to ")]
    return report["steps"], int(line.split(" ")[4].replace(",", ""))


def kernels(step):
    """Return the number of launches of Transformer Engine's communication kernels, by purpose."""
    found = Counter()
    for name, calls in step["kernels"].items():
        for part, purpose in {
            "userbuffers_fp16_sum_inplace_gpu_rr_rs_oop": "sums of pieces",
            "kuserbuffers_pushsend": "gathers of pieces",
            "userbuffers_fp16_sum_inplace_gpu_rw_ag": "gathers",
            "userbuffers_fp16_sum_inplace_gpu_rr_rsI": "sums",
        }.items():
            found[purpose] += calls * (part in name)
    return found


def expected(tp, layers, *, reference=1, again=0, fused=True, blocks=False):
    """Return the launches of Transformer Engine's communication kernels in a micro-batch.

    layers     number of layers with the overlap
    reference  number of forward passes of the reference
    again      how many parts of a layer (attention, MLP) are recomputed in the backward pass: 0, 1 or 2
    fused      whether norms are fused with the linear layers after them
    blocks     whether output gradients are gathered once more, with other scales, for the gradients of weights
    """
    sums, gathers = 2 * (reference + 1) + again, 4 + 2 * blocks
    if not fused:  # fused layers gather their inputs in pieces only while autograd is on
        gathers += 2 * reference + again
    return {
        "sums of pieces": layers * SPLITS * sums,
        "gathers of pieces": layers * (tp - 1) * gathers,
        "gathers": layers * 2 * fused,
        "sums": layers * 2 * fused,
    }


CASES = {  # the keys, and the expected launches
    "tp2": (layout(tp=2), expected(2, 2)),
    "tp4": ((*layout(tp=4), "--rank", "3"), expected(4, 2)),
    "tp8": (layout(tp=8), expected(8, 2)),
    "dp2": ((*layout(tp=2), "--world", "4", "parallel.overlap=true"), expected(2, 2)),
    "cp2": (layout(tp=2, cp=2), expected(2, 2)),
    "second stage": ((*layout(tp=2, pp=3), "--rank", "3"), expected(2, 1)),
    "last stage": ((*layout(tp=2, pp=3), "--rank", "5"), expected(2, 0)),
    "interleaved": ((*layout(tp=2, pp=2), "parallel.vpp=2", "--layers", "4"), expected(2, 2)),
    "recompute mlp": ((*layout(tp=2), "model.recompute=selective"), expected(2, 2, again=1)),
    "recompute full": ((*layout(tp=2), "model.recompute=full"), expected(2, 2, again=2)),
    "stored reference": ((*layout(tp=2), "reference.mode=stored"), expected(2, 2, reference=0)),
    "offloaded reference": ((*layout(tp=2), "reference.mode=offloaded", "reference.ahead=1"), expected(2, 2)),
    "tensorwise": ((*layout(tp=2), *TENSORWISE), expected(2, 2)),
    "tensorwise tp4 recompute": ((*layout(tp=4), *TENSORWISE, "model.recompute=full"), expected(4, 2, again=2)),
    "tensorwise first layer in bf16": ((*layout(tp=2), *TENSORWISE, SOME_IN_BF16), expected(2, 2)),
    "mxfp8": ((*layout(tp=2), *MXFP8), expected(2, 2, blocks=True)),
    "mxfp8 cp2": ((*layout(tp=2, cp=2), *MXFP8), expected(2, 2, blocks=True)),
    "adapters": ((*layout(tp=2), "adapter.rank=16"), expected(2, 2, fused=False)),
    "dora": ((*layout(tp=2), "adapter.kind=dora", "model.recompute=full"), expected(2, 2, again=2, fused=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_transformer_engine_communicate(name):
    keys, launches = CASES[name]
    for step in steps(*keys, ON)[0]:
        assert kernels(step) == {name: step["micro_batches"] * calls for name, calls in launches.items()}
        assert step["waits_in_micro_batches"] == 2 * (name == "offloaded reference"), step["phases"]
        assert step["waits_besides"] <= 4, step["phases"]


def collectives(step, tokens):
    """Return the number of NCCL's gathers and sums of a whole row over two ranks."""
    kinds = ("all_gather", "reduce_scatter")
    return Counter({kind: step["collectives"].get(f"{kind} {tokens * HIDDEN * 2} bytes over 2", 0) for kind in kinds})


def test_nccl_communicates_less():
    """All pairs have equal lengths, and each row has one pair, so rows have the same size with and without overlap."""
    keys = (*SHAPE, *layout(tp=2), "batch.layout=tree")
    plain, overlapped = (run(*keys, *more)["last"] for more in ((), (ON,)))
    count, layers = plain["micro_batches"], LAYERS - 1
    assert overlapped["micro_batches"] == count == 2
    fewer = collectives(plain, 472)
    fewer.subtract(collectives(overlapped, 472))
    # The overlap replaces these collectives of each layer except the last. Attention and MLP sum their outputs in the
    # forward passes of the reference and the policy (4 sums), and the gradients of their inputs in the backward pass
    # (2). They gather their inputs in the policy's forward pass (2 gathers), and again for the gradients of weights
    # (2). They also gather the gradients of their outputs (2).
    assert fewer == {"reduce_scatter": count * layers * 6, "all_gather": count * layers * 6}
    assert kernels(plain) == dict.fromkeys(kernels(overlapped), 0)


def test_every_row_has_the_size_of_the_buffers():
    (*_, last), tokens = steps(*layout(tp=2), ON)
    assert last["micro_batches"] == 2 and tokens % 2 == 0
    assert min(collectives(last, tokens).values()) > 0
    whole = [name for name in last["collectives"] if name.startswith("all_gather") and name.endswith("over 2")]
    assert f"all_gather {tokens * HIDDEN * 2} bytes over 2" in whole
    # The last layer computes its output only for the token positions that predict a scored token. The other gathers
    # contain only these positions.
    assert all(int(name.split(" ")[1]) <= tokens * HIDDEN * 2 for name in whole)


def test_memory():
    """The communication buffers are outside of torch's allocator. The workspaces of three products are inside it."""
    keys = ("--model", "llama3_8b", "--layers", "4", "--lengths", "1024,512,512", "model.spec=te", "batch.layout=tree")
    flags, workspaces = 16 << 20, 3 << 25
    for precision, each in ((), 12 * 2), (TENSORWISE, 8 + 4 * 2), ((*TENSORWISE, SOME_IN_BF16), 12 * 2 + 8 + 4 * 2):
        plain, overlapped = (run(*keys, *layout(tp=2), *precision, *more) for more in ((), (ON,)))
        buffers = 2048 * HIDDEN * each
        more = overlapped["last"]["outside"] - plain["last"]["outside"]
        assert buffers <= more <= buffers + flags
        assert overlapped["last"]["peak"] - plain["last"]["peak"] == pytest.approx(workspaces, abs=32 << 20)
        # The estimate assumes that the prompt is computed once for each response: 3,072 tokens instead of 2,048.
        assert overlapped["expected_peak"] - plain["expected_peak"] == buffers * 3072 // 2048 + workspaces


def test_a_model_with_norms_of_heads():
    keys = (
        "--model",
        "qwen3_4b",
        "--layers",
        str(LAYERS),
        "--lengths",
        "64,32,32",
        "model.spec=te",
        "batch.layout=tree",
    )
    last = run(*keys, *layout(tp=2), ON)["last"]
    assert kernels(last) == {name: last["micro_batches"] * calls for name, calls in expected(2, 2).items()}


@pytest.mark.parametrize("model, shared", [("qwen3_30b_a3b", False), ("qwen2_moe_14b", True)])
def test_experts(model, shared):
    """The overlap covers attention and shared experts. NCCL still exchanges the tokens of routed experts."""
    keys = ("--model", model, "--layers", "2", "--lengths", "64,32,32", "model.spec=te", "batch.layout=tree")
    last = run(*keys, *layout(tp=2), "parallel.ep=2", ON)["last"]
    found = {name: calls // last["micro_batches"] for name, calls in kernels(last).items()}
    assert found == {
        "sums of pieces": SPLITS * 2 * (1 + shared),
        "gathers of pieces": 2 + 3 * shared,  # no norm is fused with the shared MLP's first layer
        "gathers": 1,
        "sums": 1,
    }


def test_a_gpu_without_multicast():
    command = [HERE / "nullgpu", sys.executable, HERE / "one_rank.py", *SHAPE, *layout(tp=2), "batch.layout=tree", ON]
    environment = os.environ | {"NULLGPU_MIB": "81559", "UB_SKIPMC": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot write to several GPUs at once (multicast); set the environment variable UB_SKIPMC=1" in done.stderr
