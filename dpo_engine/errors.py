"""Errors a user can cause, each with its exit code; anything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 400
"""Characters of a message on a terminal: one that says a file's own words may be of any length."""


def printable(text: str) -> str:
    """The text on one line, with what would move a terminal's cursor or colour it written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, longest: int = LONGEST) -> str:
    """At most so many characters, without the middle where there are more: place and way out are at the ends."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def quoted(value: object, longest: int = 40) -> str:
    """Words of a file within a message: in quotes, printable and not long."""
    return shorten(printable(repr(shorten(str(value), longest))), 2 * longest)


class EngineError(Exception):
    """A user-facing error: `problems` are single lines, all of those known at once.

    Accepts one line or several; `str()` gives one problem per line. One that is `alone` is known to this rank only.
    """

    exit_code = 1
    alone = False

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
