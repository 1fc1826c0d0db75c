"""Compare the speed and memory of the engine with those of TRL's DPOTrainer, for the same weights, pairs and loss."""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pair_sets
import torch
from contest import NO_OPTIONS, SHAPES, TRL_DEFAULT, Contest, micro_batch_size
from report import TOLERANCE, Disagreement, as_json, machine

from dpo_engine.errors import EngineError

HERE = Path(__file__).parent
MICRO_BATCHES = (1, 2, 4, 8)
SWEEP = [NO_OPTIONS] + [
    f"mb{size}{grouped}{precomputed}"
    for size in MICRO_BATCHES
    for grouped in (("", "+grouped") if size > 1 else ("",))
    for precomputed in ("", "+precomputed")
    if size != TRL_DEFAULT or grouped or precomputed
]
QUICK = {"shape": "smoke", "pairs": 4, "global_batch_size": 2, "repeats": 1, "trl": ["mb1", "mb2+grouped"]}


def trl_setting(text: str) -> str:
    """Validate a TRL setting from the command line."""
    if text != NO_OPTIONS and not re.fullmatch(r"mb[1-9]\d*(\+grouped)?(\+precomputed)?(\+onednn)?", text):
        raise argparse.ArgumentTypeError(
            f"{text}: is not a valid TRL setting; examples: '{NO_OPTIONS}', mb4, mb4+grouped, mb4+grouped+precomputed, "
            "mb4+onednn"
        )
    return text


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("data", nargs="+", help=f"{', '.join(pair_sets.LENGTHS)}, or a file of pairs")
    add(
        "--ours",
        nargs="*",
        action="append",
        metavar="A.B=C",
        help="config overrides that define one engine variant; repeat the option to add variants",
    )
    add("--trl", nargs="*", type=trl_setting, metavar="SETTING", help="TRL settings to run; default: the full sweep")
    add("--pairs", type=int, default=64, help="number of pairs per epoch; must be a multiple of the global batch size")
    add("--global-batch-size", type=int, default=32)
    add("--epochs", type=int, default=1)
    add(
        "--repeats",
        type=int,
        default=3,
        help="number of timed rounds of each engine variant and of TRL's fastest setting",
    )
    add(
        "--warmup-steps",
        type=int,
        default=2 if torch.cuda.is_available() else 0,
        help="number of steps at the start that are not timed",
    )
    add("--shape", choices=SHAPES, default="tiny", help="size of the Llama model with random weights")
    add("--model", help="use this Hugging Face checkpoint instead of --shape")
    add("--adapter", type=int, metavar="RANK", help="train LoRA adapters of this rank instead of all weights")
    add("--dtype", choices=TOLERANCE, default="bf16" if torch.cuda.is_available() else "fp32")
    add("--tokenizer", help="for pairs from files: a transformers directory or a sentencepiece *.model file")
    add("--chat-template", help="for files of conversations: a file with a Jinja template")
    add("--max-length", type=int, default=2048, help="for pairs from files: skip longer pairs")
    add("--lr", type=float, default=5e-4)
    add("--threads", type=int, default=1, help="CPU threads per process; no effect on a GPU")
    add("--no-flops", action="store_true", help="do not count operations")
    add("--save", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    add("--quick", action="store_true", help="a one-minute smoke test; its results are not meaningful")
    asked = parser.parse_args(argv)
    if asked.quick:
        parser.set_defaults(**QUICK)
        asked = parser.parse_args(argv)
    asked.ours = asked.ours or [[]]
    asked.trl = SWEEP if asked.trl is None else asked.trl
    if asked.pairs % asked.global_batch_size:
        parser.error(f"--pairs {asked.pairs}: must be a multiple of --global-batch-size {asked.global_batch_size}")
    for text in asked.trl:
        if asked.global_batch_size % micro_batch_size(text):
            parser.error(
                f"--trl {text}: its micro-batch size must divide --global-batch-size {asked.global_batch_size}"
            )
    for name in asked.data:
        if name not in pair_sets.LENGTHS and not (asked.tokenizer and Path(name).is_file()):
            parser.error(f"{name}: must be {', '.join(pair_sets.LENGTHS)} or a file; a file also needs --tokenizer")
    return asked


def main(argv: list[str] | None = None) -> int:
    """Run the comparison that the command line requests.

    Returns  0 if all results agree, 1 if the results of two runs differ, or the exit code of the engine's error
    """
    asked = arguments(argv)
    reports, found = [], {}
    try:
        for name in asked.data:
            with tempfile.TemporaryDirectory() as folder:
                contest = Contest(asked, name, Path(folder))
                reports.append(contest.hold())
                print(reports[-1] + "\n", flush=True)
                found[Path(name).name] = as_json(contest.settings)
    except (Disagreement, EngineError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 1)
    if asked.save:
        save(asked, reports, found)
    return 0


def save(asked: argparse.Namespace, reports: list[str], found: dict[str, Any]) -> None:
    """Write the table and all measurements, together with a description of the machine."""
    facts = machine()
    said = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
    target = HERE / "results" / asked.save
    target.parent.mkdir(exist_ok=True)
    settings = {name: value for name, value in vars(asked).items() if name not in ("data", "model", "tokenizer")}
    content = {"machine": facts, "settings": settings, "measured": found}
    target.with_name(f"{asked.save}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    target.with_name(f"{asked.save}.md").write_text("\n\n".join([f"## {asked.save}", said, *reports]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
