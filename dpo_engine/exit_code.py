"""What this rank leaves with, told to whoever started it."""

import os
from contextlib import suppress


def record(code: int) -> int:
    """Add the exit code to the file that ``DPO_EXIT_CODES`` names, if it names one; returns the code.

    Launchers lose what ranks leave with: torchrun gives 1, and srun the largest code, that of a rank it ended itself.
    """
    path = os.environ.get("DPO_EXIT_CODES")
    if path:
        with suppress(OSError):  # a full disk may be what the code is about
            with open(path, "a", encoding="ascii") as file:
                file.write(f"{code}\n")
    return code
