"""Entry point for `python -m dpo_engine`, which torchrun and srun start."""

import signal
import sys

from dpo_engine.exit_code import record

# Megatron's checkpoint writer spawns processes, and each of them imports this file again.
if __name__ == "__main__":
    # Block signals during imports; they are delivered once a handler is installed.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    from dpo_engine.cli import main

    code = 1  # for an unhandled exception, whose traceback Python prints
    try:
        code = main()
    except SystemExit as left:  # raised by argparse
        code = left.code
        raise
    finally:
        record(code)
    sys.exit(code)
