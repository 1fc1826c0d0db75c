"""The verbs: `dpo-engine train|check|eval|... RUN.yaml [a.b=c ...]`, alone or under torchrun or srun."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from dpo_engine import __version__
from dpo_engine.config.run import Config, draft
from dpo_engine.errors import ConfigError, DataError, EngineError, PeerError, printable, shorten
from dpo_engine.training.interruption import SIGNALS, Interruption

EXIT_CODES = """exit codes: 0 done; 1 failed, or parity or a rehearsal does not hold; 2 configuration; 3 data;
    4 checkpoint; 5 numbers; 6 another rank was lost or hangs; 75 interrupted and saved. After 6 and 75, start again to
    continue"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb on this rank; returns the exit code.

    What a user can cause is one line per problem on stderr, said by one rank when all of them know it; `--debug` adds
    every rank's traceback.
    """
    asked = _parse(arguments)
    if not asked.debug and not sys.warnoptions:
        # What libraries warn of is for their callers' developers, and every rank would say it.
        warnings.filterwarnings("ignore", module=r"(torch|megatron|transformers|transformer_engine)\b")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else C++ stacks of connections that are tried again
    if asked.verb not in NOTE_SIGNALS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        return VERBS[asked.verb](asked)
    except KeyboardInterrupt:
        return 130
    except EngineError as error:
        return _fail(error, asked.debug, alone=error.alone)
    except Exception as error:
        if (known := _users(error)) is None:
            raise
        return _fail(known, asked.debug, alone=not isinstance(known, PeerError))


def _users(error: Exception) -> EngineError | None:
    """The error as one that a user can do something about; ``None`` for a bug."""
    if isinstance(error, OSError) and error.filename is not None:
        return EngineError(f"{error.filename}: {error.strerror}")
    if "torch.distributed" not in sys.modules:
        return None
    from dpo_engine.platform.parallel import communication_error

    return communication_error(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, overrides and options in any order. Exits with 2 when it is not one."""
    parser = _parser()
    asked, rest = parser.parse_known_args(arguments)
    for text in rest:
        if text.startswith("-") and text != "--":
            hint = f"; an override is written without dashes: {text.lstrip('-')}" if "=" in text else ""
            parser.error(f"unknown option {text}{hint}")
    if "overrides" not in asked:
        if rest:
            parser.error(f"{asked.verb} takes two files; {' '.join(rest)} is too much")
        return asked
    # argparse ends the list of overrides at the first option behind it.
    asked.overrides += [text for text in rest if text != "--"]
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpo-engine",
        description="Preference optimisation on Megatron-Core: one run is one YAML file.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="train | check | reference | eval | compare | export | rehearse | parity"
    )
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared = argparse.ArgumentParser(add_help=False, parents=[debug])
    shared.add_argument("run", metavar="RUN.yaml", help="the run's file")
    shared.add_argument("overrides", metavar="a.b=c", nargs="*", help="set one key; the value is YAML")
    verbs.add_parser("train", parents=[shared], help="train, evaluate, save and export")
    check = verbs.add_parser(
        "check", parents=[shared], help="say everything that is wrong with a run, without Megatron and without training"
    )
    check.add_argument(
        "--world-size", type=int, metavar="N", help="ranks the run will have; without it, as few as its layout needs"
    )
    verbs.add_parser(
        "reference", parents=[shared], help="score the run's pairs with the reference, once, into its store"
    )
    judge = verbs.add_parser("eval", parents=[shared], help="judge a checkpoint of a run on its held-out pairs")
    judge.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint of this step, 0 for model.path; without it, the newest"
    )
    judge.add_argument("--to", metavar="FILE", help="the .parquet to write; without it, one in train.output_dir")
    judge.add_argument("--against", metavar="FILE", help="the .parquet of an evaluation to compare with, pair by pair")
    compare = verbs.add_parser("compare", parents=[debug], help="compare two evaluations pair by pair, without a model")
    compare.add_argument("first", metavar="FIRST.parquet", help="what eval or train wrote")
    compare.add_argument("second", metavar="SECOND.parquet", help="another; differences are the first minus this")
    export = verbs.add_parser("export", parents=[shared], help="write a checkpoint of a run in Hugging Face form")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; without it, the newest")
    export.add_argument("--to", metavar="DIR", help="where to; without it, a directory in train.output_dir")
    rehearse = verbs.add_parser(
        "rehearse",
        parents=[shared],
        help="kill, stop and continue the first steps of a run on this machine, and compare the numbers",
    )
    rehearse.add_argument(
        "--world-size", type=int, metavar="N", help="ranks to start; without it, as few as its layout needs"
    )
    parity = verbs.add_parser(
        "parity",
        parents=[shared],
        help="compare the run's layout with one process, stacked, on a few of its pairs",
    )
    parity.add_argument(
        "--fp64", action="store_true", help="compute in fp64, where only a mistake can make a difference"
    )
    return parser


def _train(asked: argparse.Namespace) -> int:
    with Interruption() as interruption:
        config = _checked(asked)
        from dpo_engine.verbs.train import train

        summary = train(config, interruption)
    _print([f"done: {_summary_line(summary)}", *(f"{name}: {path}" for name, path in _paths(config, summary))])
    return 0


def _check(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    if _rank() == 0:
        from dpo_engine.verbs.summary import summarise

        _print([f"{asked.run}: nothing wrong", *summarise(config, _world(asked))])
    return 0


def _reference(asked: argparse.Namespace) -> int:
    with Interruption() as interruption:
        config = _checked(asked)
        from dpo_engine.verbs.reference import fill_store

        fill_store(config, lambda line: _print([line]), interruption)
    return 0


def _export(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.export import export

    written = export(config, step=asked.step, to=asked.to, say=lambda line: _print([line]))
    _print([f"wrote {written}"])
    return 0


def _eval(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.reporting.comparison import show, show_comparison
    from dpo_engine.verbs.evaluate import evaluate

    found = evaluate(config, step=asked.step, to=asked.to, against=asked.against, say=lambda line: _print([line]))
    if _rank() == 0:
        show(found, _console())
        if asked.against:
            show_comparison(found["against"], _console())
        _print([f"wrote {path}" for path in found["files"]])
    return 0


def _compare(asked: argparse.Namespace) -> int:
    from dpo_engine.reporting.comparison import compare, show_comparison
    from dpo_engine.reporting.pair_file import read_evaluation

    first, second = (read_evaluation(path) for path in (asked.first, asked.second))
    show_comparison(compare(first, second, names=(asked.first, asked.second)), _console())
    return 0


def _console() -> Any:
    """The terminal; elsewhere lines as long as they come, without colours."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 1000)


def _parity(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.parity import parity

    return 0 if parity(config, lambda line: _print([line]), fp64=asked.fp64) else EngineError.exit_code


def _rehearse(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.platform.parallel import world_from_environment
    from dpo_engine.verbs.rehearse import rehearse

    if world_from_environment()[1] > 1:
        raise ConfigError("rehearse: starts the ranks itself; start it alone, with --world-size N")
    parallel = config.parallel
    world = _world(asked) or parallel.tp * parallel.pp * parallel.cp
    arguments = [asked.run, *asked.overrides]
    return 0 if rehearse(config, arguments, world=world, say=lambda line: _print([line])) else EngineError.exit_code


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "check": _check,
    "reference": _reference,
    "eval": _eval,
    "compare": _compare,
    "export": _export,
    "rehearse": _rehearse,
    "parity": _parity,
}
NOTE_SIGNALS = ("train", "reference")
"""Verbs that finish what they do when a signal comes; the others end at once."""


def _checked(asked: argparse.Namespace) -> Config:
    """The run. Raises `ConfigError`, or `DataError` when only records are wrong, with everything that is wrong."""
    read = draft(asked.run, asked.overrides)
    if read.config is None:
        raise ConfigError(read.problems)
    from dpo_engine.verbs.check import examine

    command = " ".join(["-m dpo_engine", asked.verb, asked.run, *asked.overrides])
    found = examine(read.config, _world(asked), broken=read.broken | _unread(asked.verb, read.config), launch=command)
    if read.problems or found.config:
        raise ConfigError([*read.problems, *found.config, *found.data])
    if found.data:
        raise DataError(found.data)
    return read.config


def _unread(verb: str, config: Config) -> frozenset[str]:
    """Keys of files that the verb does not open; what is wrong with them does not concern it."""
    unread = set() if verb in ("train", "check") else {"checkpoint.export"}
    if verb == "export":
        unread |= {"data.train", "data.validation"}
    if verb == "eval" and config.data.validation:
        unread.add("data.train")
    return frozenset(unread)


def _world(asked: argparse.Namespace) -> int | None:
    """Ranks of the run: as asked, or as started; None for ``check`` told neither, and for a verb that starts ranks."""
    from dpo_engine.platform.parallel import world_from_environment

    if getattr(asked, "world_size", None) is not None:
        if asked.world_size < 1:
            raise ConfigError(f"--world-size={asked.world_size}: must be at least 1; give the number of ranks")
        return asked.world_size
    _, world = world_from_environment()
    return None if asked.verb in ("check", "rehearse", "parity") and world == 1 else world


def _summary_line(summary: dict[str, Any]) -> str:
    evaluated, trained = summary.get("eval") or {}, summary.get("train") or {}
    parts = [f"{summary['step']} steps"]
    parts += [f"{name} {trained[name]:.4f}" for name in ("loss",) if name in trained]
    parts += [f"held-out {label} {evaluated[name]:.4f}" for name, label in _HELD_OUT if name in evaluated]
    return ", ".join(parts)


_HELD_OUT = (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin"))


def _paths(config: Config, summary: dict[str, Any]) -> list[tuple[str, str]]:
    named = [("metrics", f"{config.train.output_dir}/metrics.jsonl"), ("model", summary.get("hf"))]
    return [(name, path) for name, path in named if path]


def _print(lines: Sequence[str]) -> None:
    """Write to stdout, on rank 0 only."""
    if _rank() == 0:
        sys.stdout.write("\n".join(printable(part) for line in lines for part in line.split("\n")) + "\n")
        sys.stdout.flush()


def _fail(error: EngineError, debug: bool, *, alone: bool = False) -> int:
    """Say an error, once, or on each rank that may be ``alone`` with it. Returns its exit code."""
    if alone or _speaks(error):
        here = "" if _rank() == 0 else f"[{socket.gethostname()} rank {_rank()}] "
        sys.stderr.write("".join(f"{here}{shorten(printable(problem))}\n" for problem in error.problems))
    if debug:
        traceback.print_exc()
    sys.stderr.flush()
    return error.exit_code


def _rank() -> int:
    from dpo_engine.platform.parallel import world_from_environment

    return world_from_environment()[0]


def _speaks(error: EngineError) -> bool:
    """Whether this rank is the one to say what went wrong.

    All ranks leave a run together, with one error. Under torchrun its agent's store, which outlives the ranks, knows
    who said it first; elsewhere the first rank of each node speaks, and the second too where the first may be dead.
    """
    from dpo_engine.platform.device import local_rank

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with socket.create_connection((address, port), timeout=2):
                pass  # torch tries for three times its timeout to reach a store that is gone
            store = TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return store.add(f"dpo_engine/said/{start}/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
        except (OSError, RuntimeError, KeyError, ValueError):
            pass
    return local_rank() <= isinstance(error, PeerError)
