"""Record this rank's exit code for the launch script."""

import os
from contextlib import suppress

from dpo_engine.errors import Interrupted

_progress = False


def note_progress() -> None:
    """Remember that this process has saved something that a restarted job can reuse.

    The process has saved a checkpoint, or it has saved log-probabilities in a reference store.
    """
    global _progress
    _progress = True


def forget_earlier_start() -> None:
    """On rank 0, empty the file of exit codes if torchrun may restart the ranks.

    The first line of the file must be the exit code that ended the job, not an exit code from before a restart. The
    file is also emptied at the first start, because torchrun's restart count may differ between nodes and therefore
    does not tell reliably whether this start is a restart.
    """
    again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if (path := os.environ.get("DPO_EXIT_CODES")) and again and os.environ.get("RANK") == "0":
        with suppress(OSError), open(path, "w", encoding="ascii"):
            pass


def record(code: int) -> int:
    """If ``DPO_EXIT_CODES`` is set, append the exit code to the file that the variable names. Return the code.

    Launchers do not pass on the exit code of the rank that failed. torchrun always exits with 1. srun exits with the
    largest code of all ranks, which usually belongs to a rank that srun itself killed.

    After an interruption without progress (see :func:`note_progress`), a line ``no-progress`` follows the code. The
    launch script counts these interruptions. Otherwise, a job that is always interrupted before it makes progress would
    be restarted forever.
    """
    path = os.environ.get("DPO_EXIT_CODES")
    if path:
        idle = code == Interrupted.exit_code and not _progress
        with suppress(OSError):  # the disk may be full, which may be why the run failed
            with open(path, "a", encoding="ascii") as file:
                file.write(f"{code}\nno-progress\n" if idle else f"{code}\n")
    return code
