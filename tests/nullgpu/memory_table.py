"""Write the table of estimated and measured memory in docs/gpu.md.

First build the null GPU with `build.sh`. Then run this command:

    PYTHONPATH=.:kernels python tests/nullgpu/memory_table.py

test_null_gpu_memory.py checks the same runs.
"""

import re
import sys
from pathlib import Path
from typing import Any

from runs import GIB, run

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- measured by tests/nullgpu/memory_table.py -->", "<!-- end of memory_table.py -->"

LLAMA_8B = ("--model", "llama3_8b", "--world", "8")
LLAMA_8B_HOST = (*LLAMA_8B, "reference.mode=stored", "optim.states=host")
LLAMA_70B = ("--model", "llama3_70b", "--world", "64", "--pairs", "8")
LLAMA_1B = ("--model", "llama3_1b")
QWEN_4B = ("--model", "qwen3_4b")
LEAST = ("optim.gradients=bf16", "model.recompute=full", "reference.mode=stored")
TREE = ("batch.layout=tree", "batch.tokens_per_micro_batch=4096")

CELLS: dict[str, tuple[str, ...]] = {
    "8B, tp 1, dp 8": LLAMA_8B,
    "8B, tp 1, dp 8, `recompute: selective`": (*LLAMA_8B, "model.recompute=selective"),
    "8B, tp 1, dp 8, `recompute: full`": (*LLAMA_8B, "model.recompute=full"),
    "8B, tp 1, dp 8, stored reference": (*LLAMA_8B, "reference.mode=stored"),
    "8B, tp 1, dp 8, stored reference, `optim.states: host`": LLAMA_8B_HOST,
    "8B, tp 1, dp 8, rows of trees": (*LLAMA_8B, *TREE),
    "8B, tp 2, dp 4": (*LLAMA_8B, "parallel.tp=2"),
    "8B, tp 2, cp 2, dp 2": (*LLAMA_8B, "parallel.tp=2", "parallel.cp=2"),
    "8B, tp 2, cp 2, dp 2, rows of trees": (*LLAMA_8B, "parallel.tp=2", "parallel.cp=2", *TREE),
    "70B, tp 8, pp 4, vpp 2, dp 2, stage 0": (*LLAMA_70B, "parallel.tp=8", "parallel.pp=4", "parallel.vpp=2"),
    "Qwen3-4B, 1 GPU": QWEN_4B,
    "Qwen3-4B, 1 GPU, `recompute: full`, stored reference": (*QWEN_4B, "model.recompute=full", "reference.mode=stored"),
    "Llama-3.2-1B, 1 GPU": LLAMA_1B,
    "Llama-3.2-1B, 1 GPU, `recompute: full`, bf16 gradients, stored reference": (*LLAMA_1B, *LEAST),
    "Llama-3.2-1B, 1 GPU, as above, with `optim.states: host`": (*LLAMA_1B, *LEAST, "optim.states=host"),
}
"""The arguments of each run, by the run's name in the table.

By default, a step has two pairs on each data-parallel rank. A pair has 2048 + 1024 + 1024 tokens (prompt, chosen and
rejected response).
"""


def row(name: str, report: dict[str, Any]) -> str:
    """Return one line of the table."""
    last, expected = report["last"], report["expected_peak"]
    sizes = (report["expected_constant"], last["after"], expected, last["peak"], last["reserved"])
    apart = f"{last['peak'] / expected - 1:+.1%}"
    *shown, reserved = (f"{size / GIB:.1f}" for size in sizes)
    return "| " + " | ".join([name, *shown, apart, reserved]) + " |"


def main() -> int:
    """Run all entries of CELLS, and replace the table in docs/gpu.md."""
    lines = ["| run | state estimated | state | peak estimated | peak | difference | reserved |", "|---" * 7 + "|"]
    for name, arguments in CELLS.items():
        lines.append(row(name, run(*arguments)))
        print(lines[-1], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join([BEGIN, *lines, END])
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, text, flags=re.DOTALL), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
