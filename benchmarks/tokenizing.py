"""Compare how fast the engine and TRL tokenize files of pairs. The engine is measured with several numbers of workers.

Every measurement runs in its own process and starts without caches. It includes reading, parsing the format, applying
the template, tokenizing and writing. It does not include imports and loading the tokenizer. A rate is a number of pairs
divided by the processor seconds of all processes.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 2048


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="records that the engine and TRL can both read: text or conversations")
    add("--tokenizer", metavar="DIR", help="default: a byte-level BPE tokenizer of 16,000 tokens, trained on the files")
    add("--repeat", type=int, default=5, help="how many times each file is repeated in the measured input")
    add("--rounds", type=int, default=3)
    add("--workers", nargs="+", type=int, default=[1, 2], help="numbers of worker processes of the engine")
    add("--save", metavar="NAME", help="write results/NAME.md")
    return parser.parse_args(argv)


def train_tokenizer(files: list[str], folder: Path) -> str:
    """Train a byte-level BPE tokenizer on the lines of some files, add a ChatML template, and return its directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=16000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((line.decode() for file in files for line in lines(file)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return str(folder)


def lines(file: str) -> list[bytes]:
    """Return the lines of a .jsonl or .jsonl.gz file."""
    content = Path(file).read_bytes()
    return (gzip.decompress(content) if file.endswith(".gz") else content).splitlines()


def engine(file: str, tokenizer: str, workers: int, folder: str) -> dict[str, Any]:
    """Tokenize with the engine."""
    from dpo_engine.config.run import Config
    from dpo_engine.data.tokenize import build_dataset
    from dpo_engine.data.tokenizer import load_tokenizer

    data = {"train": file, "max_length": MAX_LENGTH, "workers": workers, "on_bad_line": "skip"}
    raw = {"model": {"path": tokenizer}, "data": data, "train": {"output_dir": folder}}
    config = Config.parse(raw).data
    loaded = load_tokenizer(tokenizer)
    start = spent()
    pairs, report = build_dataset(config.train, loaded, config, folder)
    return {"pairs": report.read, **since(start), "ids": [[part.tolist() for part in pair[:3]] for pair in pairs]}


def trl(file: str, tokenizer: str, workers: int, folder: str) -> dict[str, Any]:
    """Tokenize with TRL's own preparation of a data set, which `DPOTrainer` calls when it is created."""
    import datasets
    from accelerate import PartialState
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    PartialState(cpu=True)
    args = DPOConfig(
        folder, dataset_num_proc=workers if workers > 1 else None, max_length=None, bf16=False, use_cpu=True
    )
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    start = spent()
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=f"{folder}/datasets")
    made = trainer._prepare_dataset(rows, trainer._tokenizer, args, "train")
    result = {"pairs": len(made), **since(start)}
    columns = [made[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return {**result, "ids": [list(ids) for ids in zip(*columns, strict=True)]}


def spent() -> tuple[float, float, float]:
    """Return the processor seconds of this process, those of its children that have ended, and the wall time."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (one.ru_utime + one.ru_stime for one in used)
    return own, children, time.perf_counter()


def since(start: tuple[float, float, float]) -> dict[str, float]:
    """Return the seconds since `start`, which :func:`spent` returned."""
    return {name: b - a for name, a, b in zip(("own_s", "children_s", "wall_s"), start, spent(), strict=True)}


def measure(side: str, file: str, tokenizer: str, workers: int) -> dict[str, Any]:
    """Run one measurement in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = [sys.executable, __file__, "--job", side, file, tokenizer, str(workers), folder, str(result)]
        environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONWARNINGS": "ignore"}
        subprocess.run(job, check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


def rate(run: dict[str, Any]) -> float:
    """Return pairs per processor second of all processes."""
    return run["pairs"] / (run["own_s"] + run["children_s"])


def compare(file: str, name: str, tokenizer: str, asked: argparse.Namespace) -> list[str]:
    """Measure all settings on one file, one after another in each round; return rows of the table."""
    settings = [*(("engine", workers) for workers in asked.workers), ("trl", 1)]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {setting: [] for setting in settings}
    ids: dict[str, list[Any]] = {}
    for turn in range(asked.rounds):
        for side, workers in settings:
            run = measure(side, file, tokenizer, workers)
            expected = ids.setdefault(side, run["ids"])
            if run.pop("ids") != expected:
                raise SystemExit(f"{name}: the ids of {side} with {workers} workers differ from those of the first run")
            runs[side, workers].append(run)
            print(f"{name} round {turn + 1}: {side}, {workers}: {rate(run):,.0f} pairs per CPU s", flush=True)
    known = {json.dumps(one) for one in ids["trl"]}
    same = sum(json.dumps(one) in known for one in ids["engine"]) / len(ids["engine"])
    print(f"{name}: {same:.1%} of the engine's pairs have the same ids in TRL", flush=True)

    def ratio(setting: tuple[str, int], base: tuple[str, int]) -> float:
        return statistics.median(rate(a) / rate(b) for a, b in zip(runs[setting], runs[base], strict=True))

    rows = []
    for side, workers in settings:
        mine = runs[side, workers]
        fields = [name, f"{mine[0]['pairs']:,}", side, str(workers)]
        fields += [
            f"{statistics.median(map(rate, mine)):,.0f}",
            f"{ratio((side, workers), settings[0] if side == 'engine' else ('trl', 1)):.2f}",
        ]
        fields += [f"{ratio((side, workers), ('trl', 1)):.2f}"]
        fields += [f"{statistics.median(run['own_s'] / run['pairs'] for run in mine) * 1e6:,.0f}"]
        fields += [f"{same:.1%}" if side == "engine" else ""]
        rows.append("| " + " | ".join(fields) + " |")
    return rows


def main() -> None:
    """Measure all files and print the table."""
    asked = arguments()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = asked.tokenizer or train_tokenizer(asked.files, Path(folder) / "tokenizer")
        over = "of one worker" if asked.workers[0] == 1 else f"of {asked.workers[0]} workers"
        columns = ("file", "pairs", "side", "workers", "pairs per CPU s", over, "over TRL")
        columns += ("CPU us per pair in the first process", "ids equal to TRL's")
        table = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        for number, file in enumerate(asked.files):
            copy = Path(folder) / f"{number}.jsonl"
            copy.write_bytes(b"".join(line + b"\n" for line in lines(file)) * asked.repeat)
            table += compare(str(copy), Path(file).name.split(".jsonl")[0], tokenizer, asked)
    print("\n".join(table))
    if asked.save:
        facts = {**machine(), **{name: __import__(name).__version__ for name in ("tokenizers", "datasets", "pyarrow")}}
        described = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        text = f"## {asked.save}\n\n{described}\n\n" + "\n".join(table) + "\n"
        (Path(__file__).parent / "results" / f"{asked.save}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        side, file, tokenizer, workers, folder, result = sys.argv[2:]
        found = {"engine": engine, "trl": trl}[side](file, tokenizer, int(workers), folder)
        Path(result).write_text(json.dumps(found))
    else:
        main()
