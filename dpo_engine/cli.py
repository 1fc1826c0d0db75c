"""The command line: parse a verb with its run and options, execute the verb, and return an exit code.

`dpo-engine train|check|eval|... [RUN.yaml] [a.b=c ...]` runs in one process, or under torchrun or srun. Each verb is
implemented in a separate file in `verbs/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from dpo_engine.checkpoint.lease import refuse_if_held
from dpo_engine.config.run import Config, draft
from dpo_engine.errors import ConfigError, DataError, EngineError, PeerError
from dpo_engine.installation import check_installation, importing, prepare_for_user
from dpo_engine.platform.launcher import world_from_environment
from dpo_engine.training.interruption import SIGNALS, Interruption
from dpo_engine.verbs import console
from dpo_engine.verbs.arguments import build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb on this rank and return the exit code.

    Errors that a user can cause are printed to stderr, with one line per problem. If all ranks are known to raise the
    same error, only some ranks print it. If torchrun hosts a store for the ranks, and this store can be used, one rank
    prints the error. Otherwise, the first rank on each node prints the error; if the error is that a rank was lost, the
    first two ranks on each node print the error. With `--debug`, every rank also prints its traceback.
    """
    if arguments is None:
        console.open_streams()
    asked = _parse(arguments)
    if not asked.debug and not sys.warnoptions:
        # Hide library warnings that are meant for developers, because every rank would repeat them.
        warnings.filterwarnings("ignore", module=r"(torch|megatron|transformers|transformer_engine)\b")
        # Hide C++ stack traces about connections that are retried.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if asked.verb not in NOTE_SIGNALS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        check_installation()
        prepare_for_user()
        return VERBS[asked.verb](asked)
    except KeyboardInterrupt:
        return 130
    except EngineError as error:
        return console.fail(error, debug=asked.debug, alone=error.alone)
    except Exception as error:
        if (known := console.known(error)) is None:
            raise
        return console.fail(known, debug=asked.debug, alone=not isinstance(known, PeerError))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides and options can come in any order. Exit with code 2 if the line is invalid."""
    parser = build_parser(VERBS)
    asked, rest = parser.parse_known_args(arguments)
    for text in rest:
        if text.startswith("-") and text != "--":
            hint = f"; write overrides without dashes: {text.lstrip('-')}" if "=" in text else ""
            parser.error(f"unknown option {text}{hint}")
    if "words" not in asked:
        if rest:
            parser.error(f"{asked.verb} has too many arguments: {' '.join(rest)}")
        return asked
    # argparse collects words only up to the next option; the remaining words are in `rest`.
    words = [*asked.words, *(text for text in rest if text != "--")]
    asked.run = words.pop(0) if words and _is_file(words[0]) else None
    asked.overrides = words
    if asked.run is None and not words and asked.verb != "config":
        parser.error(f"{asked.verb} needs a run: its YAML file, overrides (model.path=DIR ...), or both")
    return asked


def _is_file(word: str) -> bool:
    """Whether a word is the path of a run's YAML file. If not, it is an override."""
    return "=" not in word or word.endswith((".yaml", ".yml")) and Path(word).exists()


def _train(asked: argparse.Namespace) -> int:
    with Interruption() as interruption:
        config = _checked(asked)
        from dpo_engine.verbs.train import train

        summary = train(config, interruption)
    console.show(console.outcome(config, summary))
    return 0


def _check(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    if console.rank() == 0:
        from dpo_engine.verbs.dry_run import dry_run
        from dpo_engine.verbs.inspect import inspect, lines
        from dpo_engine.verbs.summary import summarize

        first = [line for pair in inspect(config, 1) for _, line in lines(pair)]
        tried = dry_run(config)
        found = [f"{asked.run or 'the run'}: no problems found", *summarize(config, _world(asked), tried)]
        console.show([*found, "  first pair (`dpo-engine inspect` shows more):", *("  " + line for line in first)])
    return 0


def _plan(asked: argparse.Namespace) -> int:
    if console.rank() == 0:
        from dpo_engine.verbs.plan import plan

        config = draft(asked.run, asked.overrides).finished()
        found = plan(config, asked.gpus, gpu_memory=asked.gpu_memory, gpu=asked.gpu, nodes=asked.nodes)
        console.show(found)
    return 0


def _inspect(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.inspect import inspect, saved_line, show

    if console.rank() == 0:
        config = draft(asked.run, asked.overrides).finished()
        show(inspect(config, asked.pairs), console.terminal(), asked.tokens)
        if line := saved_line(config):
            console.show([line])
    return 0


def _tokenize(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.tokenize import tokenize

    if console.rank() == 0:
        tokenize(config)
    return 0


def _reference(asked: argparse.Namespace) -> int:
    with Interruption() as interruption:
        config = _checked(asked)
        from dpo_engine.verbs.reference import score_reference

        score_reference(config, interruption=interruption)
    return 0


def _export(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.export import export

    written = export(config, step=asked.step, to=asked.to, best=asked.best, dtype=asked.dtype)
    console.say(f"wrote {written}")
    return 0


def _eval(asked: argparse.Namespace) -> int:
    config = None
    if asked.data is not None:
        config = draft(asked.run, asked.overrides).finished()
        # Check the sources of `--data` instead of the run's own held-out pairs, which are not read in this case.
        held_out = json.dumps(asked.data.split(","))
        asked.overrides = [*asked.overrides, f"data.validation={held_out}", "data.validation_fraction=0"]
    try:
        checked = _checked(asked)
    except ConfigError as error:
        if asked.data is None:
            raise
        problems = [re.sub(r"^data\.validation(\[\d+\]\.path)?=", "--data=", line) for line in error.problems]
        raise ConfigError(problems) from error
    from dpo_engine.reporting.comparison import show, show_comparison
    from dpo_engine.verbs.evaluate import evaluate

    found = evaluate(
        config or checked, step=asked.step, data=asked.data, to=asked.to, against=asked.against, tokens=asked.tokens
    )
    if console.rank() == 0:
        show(found, console.terminal())
        if asked.against:
            show_comparison(found["against"], console.terminal())
        console.show([f"wrote {path}" for path in found["files"]])
    return 0


def _compare(asked: argparse.Namespace) -> int:
    from dpo_engine.reporting.comparison import show_comparison
    from dpo_engine.verbs.compare import compare

    show_comparison(compare(asked.first, asked.second), console.terminal())
    return 0


def _report(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.report import report, report_as_text

    if asked.text:
        if asked.to is not None:
            raise ConfigError("--to: has no effect with --text; remove one of them")
        report_as_text(asked.directories)
    else:
        console.show([f"wrote {report(asked.directories, to=asked.to)}"])
    return 0


def _parity(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.parity import parity

    return 0 if parity(config, fp64=asked.fp64) else EngineError.exit_code


def _rehearse(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.rehearse import rehearse

    return 0 if rehearse(config, world=_world(asked)) else EngineError.exit_code


def _fetch(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.fetch import fetch

    fetch(draft(asked.run, asked.overrides).finished())
    return 0


def _config(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.config import commented, schema

    if asked.schema:
        console.document(schema())
    else:
        given = asked.run is not None or asked.overrides
        console.document(commented(draft(asked.run, asked.overrides).finished() if given else None))
    return 0


def _init(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.init import init

    written = init(asked.model, asked.data, asked.to, validation=asked.validation, output_dir=asked.output_dir)
    console.show([f"wrote {written}", f"next: dpo-engine check {written}"])
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "check": _check,
    "plan": _plan,
    "inspect": _inspect,
    "tokenize": _tokenize,
    "reference": _reference,
    "eval": _eval,
    "compare": _compare,
    "report": _report,
    "export": _export,
    "rehearse": _rehearse,
    "parity": _parity,
    "fetch": _fetch,
    "config": _config,
    "init": _init,
}
CONNECTING = ("train", "reference", "export", "eval", "parity")
"""Verbs whose ranks connect to each other."""
NOTE_SIGNALS = ("train", "reference")
"""Verbs that, when a signal arrives, first finish the work in progress. All other verbs stop immediately."""


def _checked(asked: argparse.Namespace) -> Config:
    """Load and check the run.

    Raises `ConfigError` with all problems, or `DataError` if only records have problems. For `train`, also raises
    `CheckpointError` if another run on this machine is writing to this run's output directory.
    """
    read = draft(asked.run, asked.overrides)
    if read.config is None:
        raise ConfigError(read.problems)
    world = _world(asked)
    if asked.verb == "train" and not read.problems:
        refuse_if_held(Path(read.config.train.output_dir))
    with importing():
        from dpo_engine.verbs.check import examine

    command = " ".join(["-m dpo_engine", asked.verb, *([asked.run] if asked.run else []), *asked.overrides])
    with _others_wait(asked.verb, read.config):
        found = examine(read.config, world, broken=read.broken | _unread(asked.verb, read.config), launch=command)
    if read.problems or found.config:
        raise ConfigError([*read.problems, *found.config, *found.data])
    if found.data:
        raise DataError(found.data)
    if asked.verb in CONNECTING:
        with importing():
            import dpo_engine.training.engine  # noqa: F401  imports Megatron, which the verbs use
    return read.config


def _others_wait(verb: str, config: Config) -> AbstractContextManager[None]:
    """Return a context in which the other ranks wait for this rank without a time limit.

    For a verb whose ranks do not connect to each other, the context does nothing.
    """
    if verb not in CONNECTING:
        return nullcontext()
    from dpo_engine.platform.arrival import preparing

    return preparing(config.parallel.timeout_s)


def _unread(verb: str, config: Config) -> frozenset[str]:
    """Return the keys that the verb does not use. Problems with these keys or their files must not stop the verb."""
    unread = set() if verb in ("train", "check") else {"checkpoint.export"}
    if verb == "export":
        unread |= {"data.train", "data.validation"}
    if verb == "eval" and config.data.validation:
        unread.add("data.train")
    return frozenset(unread)


def _world(asked: argparse.Namespace) -> int | None:
    """Return the number of ranks, from `--world-size` or from the launcher.

    Return None if a single process runs a verb that needs no ranks (check, tokenize) or that starts its own ranks
    (rehearse, parity).
    """
    if getattr(asked, "world_size", None) is not None:
        if asked.world_size < 1:
            raise ConfigError(f"--world-size={asked.world_size}: must be at least 1; pass the number of ranks")
        return asked.world_size
    _, world = world_from_environment()
    return None if asked.verb in ("check", "tokenize", "rehearse", "parity") and world == 1 else world


if __name__ == "__main__":
    runpy.run_module("dpo_engine", run_name="__main__", alter_sys=True)
