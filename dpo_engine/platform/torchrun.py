"""Run torchrun so that, after a signal, its ranks can finish their step and save a checkpoint.

Use ``python -m dpo_engine.platform.torchrun`` like ``torchrun``, with the same options.

The problem: when torchrun receives a signal, it passes the signal on and kills the ranks 30 s later, however much time
the scheduler allows. A second signal raises an exception while torchrun waits for the ranks, and a third one ends
torchrun before the ranks have exited. SIGUSR1, which Slurm can send before it ends a job (``sbatch --signal``), is not
handled at all.

The solution: this module makes torchrun pass on SIGUSR1 too. The module also sets a time limit that matters only if a
rank hangs: the value of the environment variable ``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` or, if this variable is not set,
:data:`WITHIN_S`. Signals after the first one have no effect. A signal that arrives before the ranks exist ends torchrun
with the exit code for an interrupted run.

Why this way: torch has read the environment variable since version 2.13. In older versions, the limit is a default
argument of ``PContext.close``, which this module overrides after a signal. The ranks cannot solve the problem
themselves, because their parent process sends them SIGKILL, which no process can handle.

Not covered: SIGKILL sent to torchrun, and a scheduler that kills the processes itself, such as Slurm after
``KillWait``.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from types import FrameType

from dpo_engine.errors import Interrupted
from dpo_engine.exit_code import record

LIMIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
WITHIN_S = 3600
"""Number of seconds for which torchrun waits for the ranks after a signal, unless the environment sets a limit."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
SIGNAL_NAMES = ",".join(number.name for number in SIGNALS)
C10D = re.compile(r"--rdzv[-_]backend[= ]c10d\b")


def describe_limit() -> list[str]:
    """Return a log line if torchrun has started this rank and torch's default limit may apply; otherwise, no line."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or LIMIT in os.environ:
        return []
    return [
        "torchrun kills the ranks 30 s after a signal, unless --shutdown-timeout is set; if a step and a save take "
        "longer, start the ranks with `python -m dpo_engine.platform.torchrun` instead of torchrun"
    ]


def main() -> None:
    """Run torchrun with the arguments of this process."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    text = os.environ[LIMIT] = os.environ.get(LIMIT) or str(WITHIN_S)
    if not text.isdecimal():
        sys.exit(f"{LIMIT}={text}: must be a whole number of seconds; unset it to wait {WITHIN_S} s")
    within = int(text)
    if C10D.search(" ".join(sys.argv)):
        # Let rank 0 host a new store for the ranks at each start. Otherwise the ranks would use the rendezvous store,
        # which may not be on rank 0's node, and which still contains the keys of the previous start.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Options that the user has given come later, and take precedence.
    sys.argv[1:1] = ["--signals-to-handle", SIGNAL_NAMES]
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import main as torchrun

    received: list[int] = []
    raise_signal, close = api._terminate_process_handler, api.PContext.close

    def first_only(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise_signal(number, frame)

    def close_in_time(context: api.PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        close(context, death_sig, within if received else timeout)

    api._terminate_process_handler = first_only
    if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__:
        api.PContext.close = close_in_time
    try:
        torchrun()
    except api.SignalException:  # the ranks have already logged what they did
        sys.exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    """End this process, which has not started any ranks yet."""
    sys.stderr.write(f"{signal.Signals(number).name}: stopped before the ranks were started; no work was lost\n")
    sys.stderr.flush()
    os._exit(record(Interrupted.exit_code))


if __name__ == "__main__":
    main()
