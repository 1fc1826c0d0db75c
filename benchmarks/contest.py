"""Compare training settings of the engine and of TRL on one data set."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pair_sets
import torch
from flops import TRAINING, Shape, bound, tree_flops
from measure import Job, Measured
from report import TOLERANCE, Setting, check_agreement, rate, ratio, table

from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.tokenizer import load_tokenizer

HERE = Path(__file__).parent
SHAPES = {
    "smoke": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4},
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "7b-width": {
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = {"smoke": 512, "tiny": 4096, "1b": 128256, "7b-width": 32000}


NO_OPTIONS = "no options"
"""Name of TRL's setting with its default micro-batch size, and of the engine's setting without overrides."""
TRL_DEFAULT = 8
"""TRL's default number of pairs per micro-batch."""


def micro_batch_size(setting: str) -> int:
    """Return the number of pairs per micro-batch in a TRL setting."""
    return TRL_DEFAULT if setting == NO_OPTIONS else int(re.match(r"mb(\d+)", setting)[1])


def save_random_model(folder: Path, shape: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> Path:
    """Save a checkpoint with random weights, and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 4096, "tie_word_embeddings": False, **SHAPES[shape]}
    config = LlamaConfig(vocab_size=vocab_size, pad_token_id=0, **sizes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes a minute for a billion numbers
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return folder


class Contest:
    """All settings of the engine and of TRL that are compared on one data set."""

    def __init__(self, asked: argparse.Namespace, name: str, folder: Path):
        self.asked, self.name, self.folder = asked, name, folder
        self.gpu = torch.cuda.is_available()
        self.pairs = self.open_pairs()
        self.model = asked.model or str(self.random_model())
        self.shape = Shape.read(self.model)
        self.adapter = str(self.random_adapter(asked.adapter)) if asked.adapter else ""
        batches = np.arange(asked.pairs).reshape(-1, asked.global_batch_size).tolist()
        warmup = [batches[i % len(batches)] for i in range(asked.warmup_steps)]
        self.steps = warmup + asked.epochs * batches
        self.timed_pairs = asked.epochs * asked.pairs
        self.settings = [*map(self.ours, asked.ours), *map(self.theirs, asked.trl)]

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the model.

        For pairs from a file, this is the size of the tokenizer, rounded up to a multiple of 64.
        """
        if self.name in pair_sets.LENGTHS:
            return Shape.read(self.asked.model).vocab if self.asked.model else VOCABULARY[self.asked.shape]
        return -(-load_tokenizer(self.asked.tokenizer).vocab_size // 64) * 64

    def open_pairs(self) -> PairDataset:
        """Write the pairs of an epoch to a file that all processes read."""
        asked = self.asked
        if self.name in pair_sets.LENGTHS:
            made = pair_sets.generate(self.name, asked.pairs, vocab_size=self.vocab_size)
        else:
            made = pair_sets.from_file(
                self.name,
                asked.pairs,
                tokenizer=asked.tokenizer,
                template=asked.chat_template,
                max_length=asked.max_length,
                cache=self.folder / "cache",
            )
        pairs = pair_sets.write(self.folder / "pairs.arrow", made)
        if len(pairs) < asked.pairs:
            raise SystemExit(f"{self.name}: has {len(pairs)} pairs of at most {asked.max_length} tokens; lower --pairs")
        return pairs

    def random_model(self) -> Path:
        """Save a checkpoint with random weights."""
        return save_random_model(self.folder / "model", self.asked.shape, self.vocab_size)

    def random_adapter(self, rank: int) -> Path:
        """Save a PEFT adapter of all projections with random weights. `B` is not zero, so no gradient is zero."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        asked = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.model), asked)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(self.folder / "adapter")
        return self.folder / "adapter"

    def ours(self, overrides: Sequence[str]) -> Setting:
        """Return a setting of the engine."""
        job = replace(self.job("engine"), overrides=tuple(overrides))
        return self.setting(
            " ".join(["ours", *(overrides or [NO_OPTIONS])]), job, stored="reference.mode=stored" in overrides
        )

    def theirs(self, text: str) -> Setting:
        """Return the TRL setting that this text from the command line describes."""
        stored = "+precomputed" in text
        job = replace(self.job("trl"), micro_batch_size=micro_batch_size(text), precomputed=stored)
        job = replace(job, grouped="+grouped" in text, onednn="+onednn" in text)
        return self.setting(f"TRL {text}", job, stored=stored)

    def job(self, side: str) -> Job:
        """Return the job parameters that the engine and TRL have in common."""
        pairs = str(self.folder / "pairs.arrow")
        asked = self.asked
        return Job(side, self.model, pairs, self.steps, lr=asked.lr, dtype=asked.dtype, adapter=self.adapter)

    def setting(self, name: str, job: Job, *, stored: bool) -> Setting:
        """Return a setting, together with its bound: the minimum number of operations that the setting needs.

        A stored reference scores each pair once; any other reference scores each pair once per epoch.
        """
        epochs = self.asked.epochs
        passes = TRAINING + (1 / epochs if stored else 1)
        once = bound(self.shape, self.pairs.lengths, passes=passes, rank=self.asked.adapter)
        return Setting(name, job, epochs * once)

    def measure(self, job: Job) -> Measured:
        """Run a job in its own process."""
        return run_job(job, threads=None if self.gpu else self.asked.threads)

    def count(self, job: Job) -> Measured:
        """Run the job again without the warm-up steps, and count the operations."""
        return self.measure(replace(job, count=True, steps=self.steps[self.asked.warmup_steps :]))

    def rate(self, setting: Setting) -> float:
        """Return pairs per second in the latest round."""
        return rate(setting.runs[-1], pairs=self.timed_pairs, warmup=self.asked.warmup_steps, gpu=self.gpu)

    def hold(self) -> str:
        """Run all rounds and return the report.

        The first round runs every setting. Later rounds run only the engine's settings and TRL's fastest setting.
        """
        asked = self.asked
        best: Setting | None = None
        for number in range(asked.repeats):
            for setting in self.settings:
                if number == 0 or setting.job.side != "trl" or setting is best:
                    setting.runs.append(self.measure(setting.job))
                    print(f"{self.name}: {setting.name}: {self.rate(setting):.2f}", file=sys.stderr, flush=True)
            apart = check_agreement(self.settings, TOLERANCE[asked.dtype])
            if number == 0 and asked.trl:
                best = max((setting for setting in self.settings if setting.job.side == "trl"), key=self.rate)
        if not (asked.no_flops or self.gpu):  # on a GPU, torch's counter misses kernels such as Triton's
            for setting in self.settings:
                if setting.job.side != "trl" or setting is best:
                    setting.counted = self.count(setting.job)
        return "\n\n".join([self.heading(apart), *self.headline(), self.table(best)])

    def headline(self) -> list[str]:
        """Compare the engine with TRL: first both settings without options, then the fastest setting of each side.

        A comparison is omitted if one of its two settings was not run.
        """
        sides = [[one for one in self.settings if (one.job.side == "trl") == trl] for trl in (False, True)]
        plain = [[one for one in side if one.name.endswith(NO_OPTIONS)][:1] for side in sides]
        best = [sorted(side, key=self.median_rate)[-1:] for side in sides]
        needed = [f"{one.name} {self.tflops(one):.1f}" for one in (*plain[0], *best[0])]
        used = [f"TFLOP/s, counting only the operations of the bound: {', '.join(dict.fromkeys(needed))}."]
        lines = [("No options", [*plain[0], *plain[1]]), ("The best of each", [*best[0], *best[1]])]
        return [
            f"{title}: {' and '.join(f'{one.name} {self.median_rate(one):.2f} pairs per second' for one in pair)}; the "
            "median of the ratios by round is "
            f"{ratio(*pair, pairs=self.timed_pairs, warmup=self.asked.warmup_steps, gpu=self.gpu):.2f}."
            for title, pair in lines
            if len(pair) == 2
        ] + (used if self.gpu and needed else [])

    def tflops(self, setting: Setting) -> float:
        """Return the rate of the operations that the bound counts, in TFLOP/s.

        The number of executed operations differs from the bound: padding adds operations, and shared prompts save some.
        """
        return self.median_rate(setting) * setting.bound / self.timed_pairs / 1e12

    def median_rate(self, setting: Setting) -> float:
        """Return the median rate over all rounds."""
        facts = {"pairs": self.timed_pairs, "warmup": self.asked.warmup_steps, "gpu": self.gpu}
        return float(np.median([rate(run, **facts) for run in setting.runs]))

    def table(self, best: Setting | None) -> str:
        """Return a table with one line per setting."""
        return table(self.settings, best, pairs=self.timed_pairs, warmup=self.asked.warmup_steps, gpu=self.gpu)

    def heading(self, apart: float) -> str:
        """Describe the data, the model, and how closely the results of the runs agree."""
        asked, shape = self.asked, self.shape
        prompt, chosen, rejected = np.median(self.pairs.lengths, axis=0)
        least = bound(shape, self.pairs.lengths, rank=asked.adapter) / asked.pairs
        states = 16 * shape.parameters / 1e6
        kept = (
            f"The weights are {states / 4:.0f} MB in fp32; LoRA adapters of rank {asked.adapter} are trained, and the "
            "reference has the adapters that training starts from."
            if asked.adapter
            else f"Weights, gradients and Adam's states are {states:.0f} MB in fp32, "
            f"and a reference {states / 4:.0f} MB."
        )
        name = self.name if self.name in pair_sets.LENGTHS else Path(self.name).name.split(".")[0]
        lines = [
            f"### {name}",
            "",
            f"{asked.pairs} pairs (median tokens: prompt {prompt:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f}), "
            f"{asked.epochs} epoch(s) in global batches of {asked.global_batch_size}, {asked.dtype}, "
            f"{shape.parameters / 1e6:.1f} M parameters; seconds are {'wall' if self.gpu else 'processor'} seconds. "
            f"Bound: {least / 1e9:.2f} GFLOP per pair with an online reference. {kept} In each step, the losses and "
            f"log-probabilities of all runs differ from those of the first run by at most {apart:.0e} (relative for "
            "values above 1 or below -1).",
        ]
        if whole := self.whole_trees():
            lines[-1] += " Computing each prompt once per global batch, and not once per pair, needs "
            lines[-1] += f"{whole:.2f} times the operations of the bound."
        return "\n".join(lines)

    def whole_trees(self) -> float | None:
        """Return, as a multiple of the bound, the operations needed if each step computes each of its prompts once.

        Return None if no step has two pairs with the same prompt.
        """
        total, shared = 0.0, False
        for step in self.steps[self.asked.warmup_steps :][: self.asked.pairs // self.asked.global_batch_size]:
            trees: dict[bytes, dict[bytes, int]] = {}
            for pair in (self.pairs[i] for i in step):
                leaves = trees.setdefault(pair.prompt.tobytes(), {})
                leaves |= {response.tobytes(): len(response) for response in (pair.chosen, pair.rejected)}
            shared |= len(trees) < len(step)
            total += sum(tree_flops(self.shape, len(ids) // 4, leaves.values()) for ids, leaves in trees.items())
        apart = bound(self.shape, self.pairs.lengths, passes=1)
        return total / apart if shared else None


def run_job(job: Job, *, threads: int | None) -> Measured:
    """Run a job in its own process and return its measurements.

    Raises `SystemExit` with the end of the process's stderr if the job fails.
    """
    environment = {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        replace(job, scratch=scratch).write(path)
        command = [sys.executable, str(HERE / f"run_{job.side}.py"), str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"run_{job.side}.py exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return Measured.parse(done.stdout)
