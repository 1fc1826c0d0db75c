"""Print the verbs' lines on rank 0, and print errors. An error that all ranks raise is printed once per job or node."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, EngineError, PeerError, printable, shorten

HELD_OUT = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


def open_streams() -> None:
    """Make sure that this process can open files with any name, and write any text to the console.

    In an ASCII locale, Python cannot open a file whose name contains other characters. In Python's UTF-8 mode, it can,
    but this mode must be selected when Python starts. This function therefore starts the same command again in the same
    process. The console keeps its encoding. Characters that this encoding lacks are written as escapes, and so are the
    bytes of a file name that are not valid UTF-8.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.orig_argv:
        if not os.environ.get("PYTHONIOENCODING"):
            os.environ["PYTHONIOENCODING"] = f"{getattr(sys.stdout, 'encoding', 'ascii')}:backslashreplace"
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(lines: Sequence[str]) -> None:
    """Write lines to stdout, on rank 0 only. Terminal control characters are escaped."""
    if rank() == 0:
        sys.stdout.write("\n".join(printable(part) for line in lines for part in line.split("\n")) + "\n")
        sys.stdout.flush()


def document(text: str) -> None:
    """Write a document, such as a run's YAML, to stdout.

    If stdout is a file or a pipe, the text is in UTF-8, so that the engine can read it back.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Write one line to stdout, on rank 0 only."""
    show([line])


def terminal() -> Any:
    """Return a rich console for stdout. If stdout is not a terminal, the output has long lines and no colors."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def outcome(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Return lines about a finished run: steps, loss, held-out metrics, and the paths of its metrics and its model."""
    evaluated, trained = summary.get("eval") or {}, summary.get("train") or {}
    parts = [f"{summary['step']} step{'' if summary['step'] == 1 else 's'}"]
    parts += [f"loss {trained['loss']:.4f}"] if "loss" in trained else []
    parts += [f"held-out {label} {evaluated[name]:.4f}" for name, label in HELD_OUT.items() if name in evaluated]
    lines = [f"done: {', '.join(parts)}", f"metrics: {config.train.output_dir}/metrics.jsonl"]
    return [*lines, f"model: {summary['hf']}"] if summary.get("hf") else lines


def known(error: Exception) -> EngineError | None:
    """Convert ``error`` to an error whose message tells the user what has failed.

    Only a failed operation on a named file and a failed communication between ranks are converted. For any other error,
    return ``None``.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return EngineError(f"{error.filename}: {error.strerror}")
    if "torch.distributed" not in sys.modules:
        return None
    from dpo_engine.platform.parallel import communication_error

    return communication_error(error)


def fail(error: EngineError, *, debug: bool, alone: bool = False) -> int:
    """Print an error to stderr and return its exit code.

    debug  also print this rank's traceback
    alone  print on this rank in any case, because other ranks may not raise this error
    """
    try:
        number, speaks = rank(), alone or _speaks(error)
    except ConfigError:  # the launcher's variables are invalid, so the rank is unknown
        number, speaks = 0, True
    if speaks:
        here = "" if number == 0 else f"[{socket.gethostname()} rank {number}] "
        sys.stderr.write("".join(f"{here}{shorten(printable(problem))}\n" for problem in error.problems))
    if debug:
        traceback.print_exc()
    sys.stderr.flush()
    return error.exit_code


def rank() -> int:
    """Return this process's rank, as set by its launcher."""
    from dpo_engine.platform.launcher import world_from_environment

    return world_from_environment()[0]


def _speaks(error: EngineError) -> bool:
    """Whether this rank should print an error that all ranks raise.

    Under torchrun, the first rank that registers the error in the agent's store prints it. If there is no such store,
    or if the store cannot be used, the first rank on each node prints the error. If a rank was lost
    (:class:`PeerError`), the second rank on each node then prints the error, too, because the first rank may be lost.
    """
    from dpo_engine.platform.launcher import local_rank

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with socket.create_connection((address, port), timeout=2):
                pass  # fail fast: if the store is unreachable, torch retries for three times the timeout
            store = TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return store.add(f"dpo_engine/said/{start}/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
        except (OSError, RuntimeError, KeyError, ValueError):
            pass
    return local_rank() <= isinstance(error, PeerError)
