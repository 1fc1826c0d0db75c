"""Measure how much processor time `dpo-engine eval` spends outside forward passes, on many short pairs.

A small Llama with random weights evaluates pairs of random words. The pairs are tokenized before the measurement. The
evaluation runs in a process of its own, so that its processor time can be measured as a whole.
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 8000
LIMIT = 0.05
"""Maximum fraction of an evaluation's processor time (without imports) that is allowed outside forward passes."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="a.b=c", help="overrides of the run's keys")
    add("--pairs", type=int, default=30_000)
    add("--profile", type=int, default=0, metavar="N", help="also print the N functions that take the most time")
    add("--save", metavar="NAME", help="write results/NAME.md")
    add("--measure", metavar="RUN.yaml", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_inputs(folder: Path, pairs: int) -> Path:
    """Write a model, a tokenizer, records, and the YAML file of a run. Tokenize the records. Return the YAML file."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(WORDS)} | {"</s>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=8192, num_key_value_heads=4, max_position_embeddings=2048, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{word}" for word in generator.integers(WORDS, size=generator.integers(low, high)))

    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for _ in range(pairs):
            row = {"prompt": text(8, 24), "chosen": " " + text(4, 28), "rejected": " " + text(4, 28)}
            file.write(json.dumps(row) + "\n")
    raw = {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"train": str(folder / "pairs.jsonl"), "validation": str(folder / "pairs.jsonl"), "max_length": 128},
        "train": {"output_dir": str(folder / "out"), "micro_batch_size": 32},
        "logging": {"progress": "off"},
    }
    (folder / "run.yaml").write_text(json.dumps(raw), encoding="utf-8")
    engine = [sys.executable, "-m", "dpo_engine"]
    subprocess.run([*engine, "tokenize", str(folder / "run.yaml")], check=True, stdout=subprocess.DEVNULL)
    return folder / "run.yaml"


def measure(run: str, overrides: list[str], profile: int) -> dict[str, Any]:
    """Evaluate a run in this process. Return processor times in seconds, and the number of pairs."""
    from dpo_engine.config.run import Config
    from dpo_engine.scoring import reference
    from dpo_engine.training import evaluate as evaluation
    from dpo_engine.verbs.evaluate import evaluate

    forward, original = [0.0], reference.score

    def timed(*args: Any, **rest: Any) -> Any:
        started = time.process_time()
        try:
            return original(*args, **rest)
        finally:
            forward[0] += time.process_time() - started

    reference.score = evaluation.score = timed
    config, imports = Config.load(run, overrides), time.process_time()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    found = evaluate(config, step=0)
    total = time.process_time() - imports
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(profile)
    return {"imports": imports, "forward": forward[0], "rest": total - forward[0], "pairs": found["groups"][0]["pairs"]}


def main() -> int:
    """Print the times, and return 1 if too much of the time is spent outside forward passes."""
    asked = arguments()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.overrides, asked.profile)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        run = write_inputs(Path(scratch), asked.pairs)
        command = [sys.executable, __file__, "--measure", str(run), "--profile", str(asked.profile), *asked.overrides]
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=settings)
    found = json.loads(done.stdout.splitlines()[-1])
    share = found["rest"] / (found["rest"] + found["forward"])
    whole = (found["rest"] + found["imports"]) / sum(found[name] for name in ("rest", "imports", "forward"))
    lines = [
        f"{found['pairs']:,} pairs; overrides: {' '.join(asked.overrides) or 'none'}",
        f"processor time in forward passes: {found['forward']:.1f} s",
        f"outside forward passes: {found['rest']:.1f} s, {share:.1%} of the evaluation (at most {LIMIT:.0%})",
        f"imports: {found['imports']:.1f} s; with them, {whole:.1%} of the process's time is outside forward passes",
    ]
    print("\n".join(lines))
    if asked.save:
        from report import machine

        facts = [f"{name}: {value}" for name, value in machine().items() if name != "trl"]
        text = "\n".join(f"- {line}" for line in [*lines, *facts])
        Path(__file__).with_name("results").joinpath(f"{asked.save}.md").write_text(text + "\n", encoding="utf-8")
    return int(share > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
