"""The command line: parse a verb with its run and options, call it, and return an exit code.

`dpo-engine train|check|eval|... [RUN.yaml] [a.b=c ...]` runs in one process or under torchrun or srun. Each verb is
implemented in its own file in `verbs/`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_engine.config.run import Config, draft
from dpo_engine.errors import ConfigError, DataError, EngineError, PeerError
from dpo_engine.training.interruption import SIGNALS, Interruption
from dpo_engine.verbs import console
from dpo_engine.version import __version__

EXIT_CODES = """exit codes: 0 success; 1 other failure, or parity or rehearse found a difference; 2 configuration error;
    3 data error; 4 checkpoint error; 5 non-finite numbers; 6 another rank was lost or hangs; 75 interrupted and saved.
    After 6 and 75, run the same command again to resume"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb on this rank and return the exit code.

    An error that a user can cause is printed to stderr, one line per problem. If all ranks raise the same error, only
    one prints it. `--debug` adds the traceback of every rank.
    """
    asked = _parse(arguments)
    if not asked.debug and not sys.warnoptions:
        # Hide library warnings meant for developers; every rank would repeat them.
        warnings.filterwarnings("ignore", module=r"(torch|megatron|transformers|transformer_engine)\b")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hide C++ stack traces of retried connections
    if asked.verb not in NOTE_SIGNALS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        return VERBS[asked.verb](asked)
    except KeyboardInterrupt:
        return 130
    except EngineError as error:
        return console.fail(error, debug=asked.debug, alone=error.alone)
    except Exception as error:
        if (known := _users(error)) is None:
            raise
        return console.fail(known, debug=asked.debug, alone=not isinstance(known, PeerError))


def _users(error: Exception) -> EngineError | None:
    """Convert an exception to an error that a user can act on; ``None`` for a bug."""
    if isinstance(error, OSError) and error.filename is not None:
        return EngineError(f"{error.filename}: {error.strerror}")
    if "torch.distributed" not in sys.modules:
        return None
    from dpo_engine.platform.parallel import communication_error

    return communication_error(error)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Overrides and options may come in any order. Exit with 2 if it is invalid."""
    parser = _parser()
    asked, rest = parser.parse_known_args(arguments)
    for text in rest:
        if text.startswith("-") and text != "--":
            hint = f"; write overrides without dashes: {text.lstrip('-')}" if "=" in text else ""
            parser.error(f"unknown option {text}{hint}")
    if "words" not in asked:
        if rest:
            parser.error(f"{asked.verb} has too many arguments: {' '.join(rest)}")
        return asked
    # argparse collects words only up to the next option; the remaining ones are in `rest`.
    words = [*asked.words, *(text for text in rest if text != "--")]
    asked.run = words.pop(0) if words and _is_file(words[0]) else None
    asked.overrides = words
    if asked.run is None and not words and asked.verb != "config":
        parser.error(f"{asked.verb} needs a run: its YAML file, overrides (model.path=DIR ...), or both")
    return asked


def _is_file(word: str) -> bool:
    """Whether a word is the path of a run's file. Any other word with an equals sign is an override."""
    return "=" not in word or word.endswith((".yaml", ".yml")) and Path(word).exists()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpo-engine",
        description="Preference optimization on Megatron-Core. A run is one YAML file: `dpo-engine init` writes a "
        "first one, and `dpo-engine config` prints all keys.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(VERBS))
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="print the traceback of an error")
    shared = argparse.ArgumentParser(add_help=False, parents=[debug])
    shared.add_argument(
        "words",
        metavar="[RUN.yaml] [a.b=c ...]",
        nargs="*",
        help="the run's YAML file and overrides; each override sets one key to a YAML value; either may be omitted",
    )
    verbs.add_parser(
        "train", parents=[shared], help="train, evaluate, save and export; resume from the newest checkpoint"
    )
    check = verbs.add_parser(
        "check", parents=[shared], help="validate a run and print what it resolves to (needs no GPU and no Megatron)"
    )
    check.add_argument(
        "--world-size", type=int, metavar="N", help="number of ranks of the run (default: as few as the layout needs)"
    )
    verbs.add_parser(
        "tokenize",
        parents=[shared],
        help="tokenize the run's data into data.cache_dir ahead of training (needs no GPU and no Megatron)",
    )
    verbs.add_parser("reference", parents=[shared], help="score the run's pairs with the reference and store them")
    evaluation = verbs.add_parser("eval", parents=[shared], help="evaluate a checkpoint of a run on its held-out pairs")
    evaluation.add_argument(
        "--step", type=int, metavar="N", help="step of the checkpoint; 0 is model.path (default: the newest)"
    )
    evaluation.add_argument("--to", metavar="FILE", help=".parquet file to write (default: one in train.output_dir)")
    evaluation.add_argument("--against", metavar="FILE", help=".parquet file of an evaluation to compare with")
    compare = verbs.add_parser("compare", parents=[debug], help="compare two evaluations pair by pair, without a model")
    compare.add_argument("first", metavar="FIRST.parquet", help="file written by eval or train")
    compare.add_argument(
        "second", metavar="SECOND.parquet", help="second such file; differences are first minus second"
    )
    export = verbs.add_parser("export", parents=[shared], help="write a checkpoint of a run in Hugging Face format")
    export.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    export.add_argument("--to", metavar="DIR", help="directory to write (default: one in train.output_dir)")
    rehearse = verbs.add_parser(
        "rehearse",
        parents=[shared],
        help="kill, stop and resume the first steps of a run on this machine, and compare the metrics",
    )
    rehearse.add_argument(
        "--world-size", type=int, metavar="N", help="number of ranks to start (default: as few as the layout needs)"
    )
    parity = verbs.add_parser(
        "parity", parents=[shared], help="compare the run's layout with a single process, on a few of its pairs"
    )
    parity.add_argument("--fp64", action="store_true", help="compute in fp64, where all layouts agree to 1e-10")
    config = verbs.add_parser("config", parents=[shared], help="print every key with its value and meaning")
    config.add_argument("--schema", action="store_true", help="print the JSON Schema of a run instead")
    init = verbs.add_parser("init", parents=[debug], help="write a commented YAML file for a first run")
    init.add_argument("--model", required=True, metavar="DIR", help="directory of a Hugging Face checkpoint")
    init.add_argument("--data", required=True, metavar="FILE", help="preference pairs to train on")
    init.add_argument("--validation", metavar="FILE", help="pairs to evaluate on (default: a fraction of --data)")
    init.add_argument(
        "--output-dir", default="runs/first", metavar="DIR", help="train.output_dir of the run (default: %(default)s)"
    )
    init.add_argument("--to", default="run.yaml", metavar="FILE", help="file to write (default: %(default)s)")
    return parser


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
        from dpo_engine.verbs.summary import summarize

        console.show([f"{asked.run or 'the run'}: no problems found", *summarize(config, _world(asked))])
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

    console.say(f"wrote {export(config, step=asked.step, to=asked.to)}")
    return 0


def _eval(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.reporting.comparison import show, show_comparison
    from dpo_engine.verbs.evaluate import evaluate

    found = evaluate(config, step=asked.step, to=asked.to, against=asked.against)
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


def _parity(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.parity import parity

    return 0 if parity(config, fp64=asked.fp64) else EngineError.exit_code


def _rehearse(asked: argparse.Namespace) -> int:
    config = _checked(asked)
    from dpo_engine.verbs.rehearse import rehearse

    return 0 if rehearse(config, world=_world(asked)) else EngineError.exit_code


def _config(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.config import commented, schema

    if asked.schema:
        sys.stdout.write(schema())
    else:
        given = asked.run is not None or asked.overrides
        sys.stdout.write(commented(draft(asked.run, asked.overrides).finished() if given else None))
    return 0


def _init(asked: argparse.Namespace) -> int:
    from dpo_engine.verbs.init import init

    written = init(asked.model, asked.data, asked.to, validation=asked.validation, output_dir=asked.output_dir)
    console.show([f"wrote {written}", f"next: dpo-engine check {written}"])
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "check": _check,
    "tokenize": _tokenize,
    "reference": _reference,
    "eval": _eval,
    "compare": _compare,
    "export": _export,
    "rehearse": _rehearse,
    "parity": _parity,
    "config": _config,
    "init": _init,
}
NOTE_SIGNALS = ("train", "reference")
"""Verbs that finish the work in progress after a signal. The others stop immediately."""


def _checked(asked: argparse.Namespace) -> Config:
    """Load and check the run. Raises `ConfigError` with all problems, or `DataError` if only records are wrong."""
    read = draft(asked.run, asked.overrides)
    if read.config is None:
        raise ConfigError(read.problems)
    from dpo_engine.verbs.check import examine

    command = " ".join(["-m dpo_engine", asked.verb, *([asked.run] if asked.run else []), *asked.overrides])
    found = examine(read.config, _world(asked), broken=read.broken | _unread(asked.verb, read.config), launch=command)
    if read.problems or found.config:
        raise ConfigError([*read.problems, *found.config, *found.data])
    if found.data:
        raise DataError(found.data)
    return read.config


def _unread(verb: str, config: Config) -> frozenset[str]:
    """Return the keys of files that the verb does not open, so that problems with these files do not stop it."""
    unread = set() if verb in ("train", "check") else {"checkpoint.export"}
    if verb == "export":
        unread |= {"data.train", "data.validation"}
    if verb == "eval" and config.data.validation:
        unread.add("data.train")
    return frozenset(unread)


def _world(asked: argparse.Namespace) -> int | None:
    """Return the number of ranks: `--world-size`, or the launcher's.

    None if a single process runs a verb that needs no ranks (check, tokenize) or starts them itself (rehearse, parity).
    """
    from dpo_engine.platform.parallel import world_from_environment

    if getattr(asked, "world_size", None) is not None:
        if asked.world_size < 1:
            raise ConfigError(f"--world-size={asked.world_size}: must be at least 1; pass the number of ranks")
        return asked.world_size
    _, world = world_from_environment()
    return None if asked.verb in ("check", "tokenize", "rehearse", "parity") and world == 1 else world
