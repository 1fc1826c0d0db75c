"""Errors that a user can cause, each with its exit code. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 400
"""Maximum characters of an error message, which may quote text of any length from a file."""


def printable(text: str) -> str:
    """Return the text on one line, with control and other unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Cut the middle of a text longer than `longest` characters; its ends name the place and the way out."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def quoted(value: object, longest: int = 40) -> str:
    """Quote a value from a file for an error message: printable and shortened."""
    return shorten(printable(repr(shorten(str(value), longest))), 2 * longest)


class EngineError(Exception):
    """A user-facing error.

    problems  one line per problem; one line or a list of them is accepted, and `str()` joins them by newlines
    alone     whether only this rank knows of the error
    """

    exit_code = 1
    alone = False

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return type(self), (self.problems,)


class ConfigError(EngineError):
    """The configuration is invalid; problems have the form `path=value: rule; way out`."""

    exit_code = 2


class DataError(EngineError):
    """A data record or file is unusable; problems have the form `file:line: what`."""

    exit_code = 3


class CheckpointError(EngineError):
    """A checkpoint is missing, damaged, or from another run."""

    exit_code = 4


class Interrupted(EngineError):
    """A signal stopped the run; its state is saved, and the same command resumes it."""

    exit_code = 75


class NumbersError(EngineError):
    """The numbers are wrong: non-finite losses, or a first step that differs from its known value."""

    exit_code = 5


class PeerError(EngineError):
    """Another rank died, hangs or is unreachable; the same command resumes from the newest checkpoint."""

    exit_code = 6
