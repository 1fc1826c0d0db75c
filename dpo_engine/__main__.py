"""`python -m dpo_engine`, the form torchrun and srun start."""

import signal
import sys

from dpo_engine.exit_code import record

# Megatron's checkpoint writer starts processes by spawn, which import this file again.
if __name__ == "__main__":
    # A signal that comes while modules are imported waits until somebody can note it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    from dpo_engine.cli import main

    code = 1  # of a bug, whose traceback Python shows
    try:
        code = main()
    except SystemExit as left:  # argparse's
        code = left.code
        raise
    finally:
        record(code)
    sys.exit(code)
