"""Start one_rank.py on the null GPU. Tests that use the same arguments share one run."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
GIB = 1 << 30
LARGE_CARD = "400000"
"""Memory of the card in MiB. It is enough for every run, so peaks above the memory of real cards can be measured."""

LONGEST_NAME = 200
"""Maximum length of a report's name. A longer name is cut and gets a digest. File systems allow 255 characters."""

requires_null_gpu = [
    pytest.mark.nullgpu,
    pytest.mark.skipif(torch.version.cuda is None, reason="requires a CUDA build of torch"),
    pytest.mark.skipif(
        not (HERE / "build" / "libnullgpu.so").exists(), reason="requires the null GPU; run tests/nullgpu/build.sh"
    ),
]
requires_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="requires Transformer Engine"
)


@functools.cache
def run(*arguments: str, capability: int = 90, card: str = LARGE_CARD) -> dict[str, Any]:
    """Run one_rank.py with these arguments, and return its report.

    ``last`` has the figures of the last completed step, or is None if no step was completed. If the device runs out of
    memory, the run ends early, and ``out_of_memory`` has the lines of the error.

    The report and the output also remain in build/reports/.

    capability  compute capability of the GPU, times 10: 80, 90 or 100
    card        memory of the GPU in MiB
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"NULLGPU_MIB": card, "NULLGPU_SM": str(capability)}
    name = re.sub(r"[^\w.=]+", "_", " ".join([f"sm{capability}", card, *arguments]).replace("--", ""))
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    file = HERE / "build" / "reports" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    command = [HERE / "nullgpu", sys.executable, HERE / "one_rank.py", "--json", file, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    file.with_suffix(".log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    report = json.loads(file.read_text())
    assert card != LARGE_CARD or "out_of_memory" not in report, report
    return report | {"last": report["steps"][-1] if report["steps"] else None}
