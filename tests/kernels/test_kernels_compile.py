"""Compile the Triton kernels for three generations of GPUs, without a GPU, and check shared memory and registers."""

import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block can use, in bytes, by compute capability."""

COMPILE = """
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dpo_kernels import triton_attention, triton_layer, triton_logits, triton_norm

FLOATS = {"lse", "delta", "sums", "grad", "logits", "sinks"}
INTEGERS = {"first", "stop", "queries_at", "keys_at", "order", "bounds", "tiles"}
OPERANDS = {"query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value", "hidden", "weight"}
OPERANDS |= {"states", "table", "mixed", "d_mixed", "query_norm", "key_norm", "both", "d_both", "d_states"}
HEAD = ("_stats_of_linear", "_grad_of_linear", "_stats_of_logits", "_grad_of_logits")

def kind(name, operand):
    if name in OPERANDS:
        return "*" + operand
    if name in FLOATS | INTEGERS | {"targets"}:
        return "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else "*i64"
    return "fp32" if name in ("scale", "softcap", "direction", "offset", "eps") else "i32"

def compiled(kernel, operand, warps, stages, constants):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else kind(name, operand) for name in names}
    strides = ("_row", "_head", "_stride")
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name.endswith(strides)]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:([0-9]+)", used)[1]  # registers spill to the stack
    print(sm, kernel.__name__, made.metadata.shared, stack, "wgmma" in made.asm["ptx"])

tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
operand, width, wanted = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
all_options = "all options" in wanted
wanted = [name for name in wanted if name != "all options"]
def compile_attention(sm, dtype):
    blocks = triton_attention.blocks_for(width, dtype, sm // 10, all_options)
    widths = dict.fromkeys(("D", "D_PADDED", "V", "V_PADDED"), width)
    constants = dict(GROUP=4, QUERIES=blocks.queries, KEYS=blocks.keys, **widths)
    constants |= dict.fromkeys(("WINDOWED", "CAPPED", "SINKS"), all_options)
    for kernel, stages in (
        (triton_attention._forward, blocks.stages),
        (triton_attention._backward_query, blocks.stages),
        (triton_attention._backward_key, blocks.key_stages),
    ):
        if kernel.__name__ in wanted or not wanted:
            compiled(kernel, operand, blocks.warps, stages, constants)

def compile_head():
    sizes = {name: getattr(triton_logits, name) for name in ("ROWS", "VOCAB", "INNER", "COLUMNS")}
    for name in [name for name in HEAD if name in wanted] or HEAD:
        options = dict(CAPPED="plain" not in wanted, MOMENTS="plain" not in wanted, **sizes)
        compiled(getattr(triton_logits, name), operand, *((8, 3) if "linear" in name else (4, 3)), options)

def compile_layer(short):
    for half, interleaved in ((64, False),) if short else ((64, False), (32, True), (0, False)):
        heads = dict(QUERIES=4, D=128, PADDED=128, HALF=half, INTERLEAVED=interleaved, TOKENS=triton_layer.ROWS)
        compiled(triton_layer._rotate, operand, 4, 3, heads)
        for backward in (False, True):
            for normed in (False, True):
                options = dict(BACKWARD=backward, NORMED=normed, SUMS=backward and normed)
                compiled(triton_layer._split_heads, operand, 4, 3, heads | options)
    for activation in ("silu",) if short else ("silu", "gelu", "gelu_tanh"):
        options = dict(ACTIVATION=activation, ELEMENTS=triton_layer.COLUMNS)
        compiled(triton_layer._gated_forward, operand, 4, 3, options)
        compiled(triton_layer._gated_backward, operand, 4, 3, options)
    for size in (5376,) if short else (1152, 5376, 8192):
        norm = triton_norm._options(size)
        compiled(triton_norm._norm_forward, operand, norm["num_warps"], 3, norm)
        compiled(triton_norm._norm_backward, operand, norm["num_warps"], 3, norm)

for sm in map(int, sys.argv[1].split(",")):
    if wanted[:1] == ["layer"]:
        compile_layer("short" in wanted)
    elif width:
        compile_attention(sm, {"bf16": torch.bfloat16, "fp32": torch.float32}[operand])
    if not width or set(HEAD) & set(wanted):
        compile_head()
"""


def compile_for(sm, operand, width, tmp_path, *kernels):
    """Compile kernels, and return what each kernel uses.

    The returned dictionary maps (compute capability, kernel) to (shared memory, stack, use of Hopper's tensor cores).
    Each size is the maximum over the kernel's variants, in bytes.

    sm       one or more compute capabilities, separated by commas
    operand  dtype of the operands
    width    size of each attention head; 0: compile the kernels of the output layer, but no attention kernels
    kernels  names that select kernels and variants
    """
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, script, str(sm), operand, str(width), *kernels],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        sm, name, *sizes, wgmma = line.split()
        before = found.get((int(sm), name), (0, 0, False))  # for the maximum over a kernel's variants
        found[int(sm), name] = (*map(max, map(int, sizes), before), wgmma == "True")
    return found


def test_largest_kernels_fit_without_spilling(tmp_path):
    names = ("_backward_key", "_stats_of_linear")
    found = compile_for("80,90,100", "bf16", 128, tmp_path, *names, "plain", "all options")
    assert found.keys() == {(sm, name) for sm in SHARED_BYTES for name in names}
    for (sm, _), (shared, stack, _) in found.items():
        assert shared <= SHARED_BYTES[sm] and stack == 0, sm


@pytest.mark.parametrize(
    "sm, operand, variants",
    [
        pytest.param("90,100", "bf16", [], marks=pytest.mark.slow),
        pytest.param("90,100", "fp32", [], marks=pytest.mark.slow),
    ],
)
def test_small_operations_fit_without_spilling(sm, operand, variants, tmp_path):
    found = compile_for(sm, operand, 128, tmp_path, "layer", *variants)
    names = {"_rotate", "_split_heads", "_gated_forward", "_gated_backward", "_norm_forward", "_norm_backward"}
    assert found.keys() == {(int(generation), name) for generation in sm.split(",") for name in names}
    for (generation, _), (shared, stack, _) in found.items():
        assert shared <= SHARED_BYTES[generation] and stack == 0


@pytest.mark.slow
@pytest.mark.parametrize("sm", SHARED_BYTES)
@pytest.mark.parametrize(
    "operand, width, options",
    [
        *(("bf16", width, []) for width in (64, 128, 256)),
        *(("bf16", width, ["all options"]) for width in (128, 256)),
        ("fp32", 64, []),
        ("fp32", 128, ["all options"]),
    ],
)
def test_attention_fits_without_spilling(sm, operand, width, options, tmp_path):
    """The case `all options` has a window, a soft cap and sinks."""
    found = compile_for(sm, operand, width, tmp_path, *options)
    assert {name for _, name in found} == {"_forward", "_backward_query", "_backward_key"}
    for (_, name), (shared, stack, wgmma) in found.items():
        assert shared <= SHARED_BYTES[sm] and stack == 0, name
        if (sm, operand) == (90, "bf16") and width <= 128:
            assert wgmma, name


@pytest.mark.slow
@pytest.mark.parametrize("sm", SHARED_BYTES)
@pytest.mark.parametrize("variant, most", [("plain", 0), ("softcap and moments", 192)])
def test_head_fits(sm, variant, most, tmp_path):
    found = compile_for(sm, "bf16", 0, tmp_path, variant)
    assert len(found) == 4
    for (_, name), (shared, stack, wgmma) in found.items():
        assert shared <= SHARED_BYTES[sm] and stack <= most, name
        if sm == 90:
            assert wgmma == (not name.endswith("_of_logits")), name
