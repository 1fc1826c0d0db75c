"""Compile the Triton kernels for a Hopper GPU, on any machine; check shared memory and the use of tensor cores."""

import os
import subprocess
import sys

import pytest

HOPPER_SHARED_BYTES = 227 * 1024

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dpo_kernels import triton_attention, triton_logits

FLOATS = {"lse", "delta", "sums", "grad", "logits"}
INTEGERS = {"first", "stop", "order", "bounds", "tiles"}
OPERANDS = {"query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value", "hidden", "weight"}

def kind(name, operand):
    if name in OPERANDS:
        return "*" + operand
    if name in FLOATS | INTEGERS | {"targets"}:
        return "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else "*i64"
    return "fp32" if name in ("scale", "softcap") else "i32"

def compiled(kernel, operand, warps, stages, constants):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else kind(name, operand) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name.endswith(("_row", "_stride"))]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    print(kernel.__name__, made.metadata.shared, "wgmma" in made.asm["ptx"])

operand, width = sys.argv[1], int(sys.argv[2])
if width:
    blocks = triton_attention.blocks_for(width * {"bf16": 2, "fp32": 4}[operand])
    widths = dict.fromkeys(("D", "D_PADDED", "V", "V_PADDED"), width)
    constants = dict(GROUP=4, QUERIES=blocks.queries, KEYS=blocks.keys, **widths)
    for kernel, stages in (
        (triton_attention._forward, blocks.stages),
        (triton_attention._backward_query, blocks.stages),
        (triton_attention._backward_key, blocks.key_stages),
    ):
        compiled(kernel, operand, blocks.warps, stages, constants)
else:
    sizes = {name: getattr(triton_logits, name) for name in ("ROWS", "VOCAB", "INNER", "COLUMNS")}
    for name in ("_stats_of_linear", "_grad_of_linear", "_stats_of_logits", "_grad_of_logits"):
        options = dict(CAPPED=True, MOMENTS=True, **sizes)
        compiled(getattr(triton_logits, name), operand, *((8, 3) if "linear" in name else (4, 3)), options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("operand, width, kernels", [("bf16", 128, 3), ("bf16", 0, 4)])
def test_kernels_compile_for_hopper(operand, width, kernels, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    (tmp_path / "compile.py").write_text(
        COMPILE
    )  # Triton reads the source of a kernel, which must therefore be in a file
    done = subprocess.run(
        [sys.executable, tmp_path / "compile.py", operand, str(width)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == kernels
    for name, shared, on_tensor_cores in lines:
        assert int(shared) <= HOPPER_SHARED_BYTES, name
        assert on_tensor_cores == str(not name.endswith("_of_logits")), name
