"""`python -m dpo_engine`, the form torchrun and srun start."""

import sys

from dpo_engine.cli import main
from dpo_engine.exit_code import record

# Megatron's checkpoint writer starts processes by spawn, which import this file again.
if __name__ == "__main__":
    sys.exit(record(main()))
