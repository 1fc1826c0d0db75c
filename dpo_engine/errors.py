"""Errors that a user can cause or fix, each with an exit code.

The command line converts failed file operations and lost connections to these errors. It prints the traceback of any
other exception, which is usually a bug.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 400
"""Maximum length of each line that an error prints, in characters. Longer lines are shortened."""


def printable(text: str) -> str:
    """Return the text on one line, with control and other unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Shorten a text to `longest` characters by cutting its middle.

    The two ends of an error message are kept because they say where the problem is and how to fix it.
    """
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def quoted(value: object, longest: int = 40) -> str:
    """Quote a value from a file for an error message: printable and shortened."""
    return shorten(printable(repr(shorten(str(value), longest))), 2 * longest)


class EngineError(Exception):
    """A user-facing error.

    problems  list of messages, one line per problem. The constructor also accepts a single string. `str()` joins the
              lines
    alone     whether the error occurs only on this rank. If so, the other ranks treat this rank as lost, and stop
    """

    exit_code = 1
    alone = False

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return type(self), (self.problems,)


class ConfigError(EngineError):
    """The configuration is invalid; most problems have the form `path=value: rule; way out`."""

    exit_code = 2


class DataError(EngineError):
    """A data record or file is unusable; most problems have the form `file:line: what is wrong`."""

    exit_code = 3


class CheckpointError(EngineError):
    """A checkpoint is missing, damaged or from another run, or an output directory cannot be used."""

    exit_code = 4


class Interrupted(EngineError):
    """A signal or the time limit stopped the run. The same command continues the run after its last completed step."""

    exit_code = 75


class NumbersError(EngineError):
    """A value is not finite, has spiked, differs between ranks, or is not the value that the first step must have."""

    exit_code = 5


class PeerError(EngineError):
    """A rank died, hangs or cannot be reached; the same command resumes the run from its newest checkpoint."""

    exit_code = 6
