"""The arguments of the command line: every verb with its options and their help texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from dpo_engine.config.paths import expand
from dpo_engine.version import __version__

EXIT_CODES = """exit codes: 0 success; 1 a failure not listed here, or a difference that parity or rehearse found;
    2 configuration error; 3 data error; 4 checkpoint error; 5 non-finite or wrong numbers; 6 a rank was lost, hangs, or
    cannot be reached; 75 interrupted (completed steps, if any, were saved). After 6 or 75, run the same command again
    to resume"""


def build_parser(names: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    names  names of the verbs, in the order of the help text
    """
    parser = argparse.ArgumentParser(
        prog="dpo-engine",
        description="Preference optimization on Megatron-Core. A run is described by a YAML file. `dpo-engine init` "
        "writes a first file, and `dpo-engine config` prints all keys.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(names))
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="print the traceback of an error")
    shared = argparse.ArgumentParser(add_help=False, parents=[debug])
    shared.add_argument(
        "words",
        metavar="[RUN.yaml] [a.b=c ...]",
        nargs="*",
        help="the run's YAML file, overrides, or both; each override sets one key to a YAML value",
    )
    verbs.add_parser(
        "train", parents=[shared], help="train, evaluate, save and export; resume from the newest checkpoint"
    )
    check = verbs.add_parser(
        "check", parents=[shared], help="validate a run and print a summary (needs neither a GPU nor Megatron)"
    )
    check.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of ranks in the run (default: the smallest number that the layout allows)",
    )
    plan = verbs.add_parser(
        "plan", parents=[shared], help="list the fastest layouts that fit on a given number of GPUs (needs no GPU)"
    )
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="total number of GPUs")
    plan.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GIB", help="memory of a GPU in GiB (default: %(default)s)"
    )
    plan.add_argument(
        "--gpu",
        choices=("A100", "H100", "H200", "B200"),
        default="H100",
        help="GPU model (default: %(default)s)",
    )
    plan.add_argument(
        "--nodes", type=int, metavar="M", help="number of nodes (default: the fewest with at most 8 GPUs per node)"
    )
    verbs.add_parser(
        "tokenize",
        parents=[shared],
        help="tokenize the run's data into data.cache_dir ahead of training (needs no GPU and no Megatron)",
    )
    inspect = verbs.add_parser(
        "inspect", parents=[shared], help="show how pairs of a run are tokenized, and which tokens are scored"
    )
    inspect.add_argument("--pairs", type=int, default=3, metavar="N", help="number of pairs (default: %(default)s)")
    inspect.add_argument("--tokens", action="store_true", help="show the token strings instead of the decoded text")
    verbs.add_parser(
        "reference", parents=[shared], help="score the run's pairs with the reference and store the results"
    )
    evaluation = verbs.add_parser("eval", parents=[shared], help="evaluate a checkpoint of a run on its held-out pairs")
    evaluation.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="step of the checkpoint; 0: the weights at model.path (default: the newest checkpoint)",
    )
    evaluation.add_argument(
        "--data",
        metavar="FILE[,FILE...]",
        help="sources of the pairs to evaluate, written like data.validation (default: the run's held-out pairs)",
    )
    evaluation.add_argument(
        "--to", type=_path, metavar="FILE", help=".parquet file to write (default: a file in train.output_dir)"
    )
    evaluation.add_argument(
        "--against", type=_path, metavar="FILE", help=".parquet file of an evaluation to compare with"
    )
    evaluation.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="also write the log-probability of each token, for N pairs",
    )
    compare = verbs.add_parser("compare", parents=[debug], help="compare two evaluations pair by pair, without a model")
    compare.add_argument("first", type=_path, metavar="FIRST.parquet", help=".parquet file written by eval or train")
    compare.add_argument(
        "second",
        type=_path,
        metavar="SECOND.parquet",
        help="the other .parquet file; each difference is FIRST minus SECOND",
    )
    report = verbs.add_parser(
        "report", parents=[debug], help="write a page that shows what runs have learned (needs no GPU and no model)"
    )
    report.add_argument("directories", type=_path, nargs="+", metavar="DIR", help="train.output_dir of a run")
    report.add_argument(
        "--to",
        type=_path,
        metavar="FILE",
        help=".html file to write (default: report.html in DIR, or in the current directory if there are several DIRs)",
    )
    report.add_argument(
        "--text",
        action="store_true",
        help="print the verdict, tables and curves on the terminal instead of writing a page",
    )
    export = verbs.add_parser("export", parents=[shared], help="write a checkpoint of a run in Hugging Face format")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest checkpoint)")
    which.add_argument(
        "--best",
        action="store_true",
        help="export the evaluated checkpoint that is best according to checkpoint.keep_best (if null: the one with "
        "the lowest eval/loss)",
    )
    export.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of all tensors (default: as in model.path)"
    )
    export.add_argument(
        "--to", type=_path, metavar="DIR", help="directory to write (default: a directory in train.output_dir)"
    )
    rehearse = verbs.add_parser(
        "rehearse",
        parents=[shared],
        help="train the first steps on this machine, interrupt and resume the run several times, and compare its "
        "metrics with those of an uninterrupted run",
    )
    rehearse.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of ranks to start (default: the smallest number that the layout allows)",
    )
    parity = verbs.add_parser(
        "parity", parents=[shared], help="compare the run's layout with a single process, on a few pairs of the run"
    )
    parity.add_argument("--fp64", action="store_true", help="compute in fp64, in which all layouts agree to 1e-10")
    verbs.add_parser("fetch", parents=[shared], help="download the run's models and data sets from the Hub")
    config = verbs.add_parser("config", parents=[shared], help="print every key with its value and meaning")
    config.add_argument("--schema", action="store_true", help="print the JSON Schema of a run instead")
    init = verbs.add_parser("init", parents=[debug], help="write a commented YAML file for a first run")
    init.add_argument(
        "--model", required=True, type=_path, metavar="DIR", help="Hugging Face checkpoint: a directory or a Hub id"
    )
    init.add_argument(
        "--data",
        required=True,
        type=_path,
        metavar="SOURCE",
        help="preference pairs to train on: a file, directory, glob or Hub id",
    )
    init.add_argument(
        "--validation",
        type=_path,
        metavar="SOURCE",
        help="preference pairs to evaluate on (default: a fraction of --data)",
    )
    init.add_argument(
        "--output-dir",
        default="runs/first",
        type=_path,
        metavar="DIR",
        help="train.output_dir of the run (default: %(default)s)",
    )
    init.add_argument(
        "--to", default="run.yaml", type=_path, metavar="FILE", help="file to write (default: %(default)s)"
    )
    return parser


def _path(text: str) -> str:
    """Return a path with `~` and variables expanded, or report why they cannot be expanded."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be {error}") from error
