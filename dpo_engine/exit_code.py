"""Record this rank's exit code for the launch script."""

import os
from contextlib import suppress


def record(code: int) -> int:
    """Append the exit code to the file named by ``DPO_EXIT_CODES``, if set. Return the code.

    Launchers lose the exit codes of ranks: torchrun exits with 1, and srun with the largest code, which is that of a
    rank it killed itself.
    """
    path = os.environ.get("DPO_EXIT_CODES")
    if path:
        with suppress(OSError):  # the run may have failed because the disk is full
            with open(path, "a", encoding="ascii") as file:
                file.write(f"{code}\n")
    return code
