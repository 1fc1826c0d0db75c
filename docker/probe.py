"""Print the stack of an image: torch, Megatron-Core, Transformer Engine, Apex. Fails if the engine cannot be imported.

This runs during the image build, where there is no GPU, so it imports packages but runs no kernels.
"""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import torch  # before Transformer Engine, whose libraries depend on torch's

from dpo_engine import __version__
from dpo_engine.platform.device import apex_state

lines = [f"dpo-engine {__version__}", f"python {sys.version.split()[0]}", f"torch {torch.__version__}"]
lines.append(f"CUDA {torch.version.cuda or 'none: a CPU image'}")
lines.append(f"megatron-core {importlib.metadata.version('megatron-core')}")
try:
    importlib.import_module("transformer_engine.pytorch")
    lines.append(f"Transformer Engine {importlib.metadata.version('transformer_engine')}")
except ImportError as error:
    lines.append(f"Transformer Engine absent ({error}): model.spec=auto uses native")
lines.append(f"Apex {apex_state()}")
lines.append("constraints " + Path("/opt/constraints.txt").read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
sys.stdout.write("\n".join(lines) + "\n")
importlib.import_module("megatron.core")
importlib.import_module("dpo_kernels")
