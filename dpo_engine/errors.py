"""Errors a user can cause, each with its exit code; anything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence


class EngineError(Exception):
    """A user-facing error: `problems` are single lines, all of those known at once.

    Accepts one line or several; `str()` gives one problem per line.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return type(self), (self.problems,)


class ConfigError(EngineError):
    """The run as described cannot work; problems read `path=value: rule; way out`."""

    exit_code = 2


class DataError(EngineError):
    """A record or file of the user's data is not usable; problems read `file:line: what`."""

    exit_code = 3


class CheckpointError(EngineError):
    """A checkpoint is missing, damaged, or was made by another run."""

    exit_code = 4


class Interrupted(EngineError):
    """A signal asked the run to stop; everything is saved, and starting it again continues it."""

    exit_code = 75


class NumbersError(EngineError):
    """The arithmetic went wrong: losses that are not finite, a first step off its known value."""

    exit_code = 5


class PeerError(EngineError):
    """Another rank died, hangs or cannot be reached; starting again continues from the newest checkpoint."""

    exit_code = 6
