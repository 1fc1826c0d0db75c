"""What a verb prints: lines on the first rank, and errors by one rank when all of them know the same one."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.errors import EngineError, PeerError, printable, shorten

HELD_OUT = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


def show(lines: Sequence[str]) -> None:
    """Write lines to stdout, on rank 0 only. Characters that would control the terminal are escaped."""
    if rank() == 0:
        sys.stdout.write("\n".join(printable(part) for line in lines for part in line.split("\n")) + "\n")
        sys.stdout.flush()


def say(line: str) -> None:
    """Write one line to stdout, on rank 0 only."""
    show([line])


def terminal() -> Any:
    """The terminal for rich output. When stdout is no terminal: long lines, no colors."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def outcome(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Lines about a finished run: steps, loss, held-out numbers, and where its metrics and its model are."""
    evaluated, trained = summary.get("eval") or {}, summary.get("train") or {}
    parts = [f"{summary['step']} steps"]
    parts += [f"loss {trained['loss']:.4f}"] if "loss" in trained else []
    parts += [f"held-out {label} {evaluated[name]:.4f}" for name, label in HELD_OUT.items() if name in evaluated]
    lines = [f"done: {', '.join(parts)}", f"metrics: {config.train.output_dir}/metrics.jsonl"]
    return [*lines, f"model: {summary['hf']}"] if summary.get("hf") else lines


def fail(error: EngineError, *, debug: bool, alone: bool = False) -> int:
    """Print an error to stderr and return its exit code.

    debug  add this rank's traceback
    alone  print on this rank in any case, because the others may not know the error
    """
    if alone or _speaks(error):
        here = "" if rank() == 0 else f"[{socket.gethostname()} rank {rank()}] "
        sys.stderr.write("".join(f"{here}{shorten(printable(problem))}\n" for problem in error.problems))
    if debug:
        traceback.print_exc()
    sys.stderr.flush()
    return error.exit_code


def rank() -> int:
    """This process's rank, as its launcher set it."""
    from dpo_engine.platform.parallel import world_from_environment

    return world_from_environment()[0]


def _speaks(error: EngineError) -> bool:
    """Whether this rank is the one that prints the error.

    All ranks leave a run together, with the same error. Under torchrun, the agent's store outlives the ranks and
    records who printed it first. Elsewhere the first rank of each node prints it; for a lost peer the second rank does
    so too, because the first may be the one that died.
    """
    from dpo_engine.platform.device import local_rank

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with socket.create_connection((address, port), timeout=2):
                pass  # torch would retry a dead store for three times its timeout
            store = TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return store.add(f"dpo_engine/said/{start}/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
        except (OSError, RuntimeError, KeyError, ValueError):
            pass
    return local_rank() <= isinstance(error, PeerError)
