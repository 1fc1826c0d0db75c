"""Entry point for `python -m dpo_engine`, which torchrun and srun start."""

import signal
import sys

from dpo_engine.exit_code import forget_earlier_start, record

# Each process that multiprocessing spawns imports this file again. Such a process must not start another
# run.
if __name__ == "__main__":
    # Block signals during the imports. A signal that arrives meanwhile stays pending. Verbs with signal handlers
    # install the handlers and then unblock signals. For other verbs, main() unblocks signals before it starts the verb.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    forget_earlier_start()
    from dpo_engine.cli import main

    code = 1  # stays 1 if main() raises; Python then prints the traceback
    try:
        code = main()
    except SystemExit as left:  # raised by argparse
        code = left.code
        raise
    finally:
        record(code)
    sys.exit(code)
