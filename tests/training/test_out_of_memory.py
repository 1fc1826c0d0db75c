"""Tests of the last message of a run whose GPU is out of memory, and of the changes that the message suggests."""

import io
import re
import sys

import pytest
import yaml
from safetensors.torch import load_file

from dpo_engine.config.run import Config
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.batch_size import largest_micro_batch
from dpo_engine.model.memory import memory
from dpo_engine.model.savings import savings
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.ranks import run_ranks
from support.small_run import write_run

TORCHS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.10 GiB is free."
)
ADVICE = " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def ended(path):
    """Run ``dpo-engine train``, with an out-of-memory error in the second step. Return the exit code and stderr."""
    import torch

    from dpo_engine.cli import main
    from dpo_engine.training import trainer

    real, steps = trainer.train_step, []

    def too_large(*rest, **named):
        steps.append(None)
        if len(steps) == 2:
            raise torch.OutOfMemoryError(TORCHS + ADVICE)
        return real(*rest, **named)

    trainer.train_step = too_large
    sys.stderr = io.StringIO()
    return main(["train", str(path)]), sys.stderr.getvalue()


def test_the_run_ends_with_the_plan_and_what_to_change(files, tiny_hf, tmp_path):
    from dpo_engine.verbs.summary import summarize

    path = write_run(tmp_path, "run", files, tiny_hf, {"model": {"dtype": "fp32"}})
    ((code, errors),) = run_ranks(ended, 1, path=path)
    assert code == 1, errors
    trace, first, planned, change = errors.rstrip().rsplit("\n", 3)
    assert trace.startswith("Traceback") and "in train_one" in trace and ADVICE in trace
    assert first == TORCHS
    checked = next(line for line in summarize(Config.parse(yaml.safe_load(path.read_text())), 1) if "fp32:" in line)
    terms = re.search(r"= weights [^;]*;", checked)[0]
    assert planned.startswith("planned for this rank: ") and terms in planned
    assert re.fullmatch(
        r"to use less memory, set one of reference.mode=stored \(.*\), train.micro_batch_size=1 \(.*\), "
        "model.recompute=.*; changes that cost less speed come first; each size is the planned memory of the rank that "
        "needs the most memory",
        change,
    )
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.partition("ended: ")[2] for line in log[-3:]] == [first, planned, change]
    (start,) = [line.partition("planned memory: ")[2] for line in log if "planned memory: " in line]
    assert start == planned.removeprefix("planned for this rank: ")
    # The weights, their gradients, Adam's two moments, and the reference's weights are in fp32.
    sizes = dict(re.findall(r"(\w+) ([\d.]+) MiB", start))
    numbers = sum(
        tensor.numel() for tensor in load_file(tiny_hf("llama", num_hidden_layers=2) / "model.safetensors").values()
    )
    for name, each in {"weights": 4, "gradients": 4, "optimizer": 8, "reference": 4}.items():
        assert float(sizes[name]) == pytest.approx(each * numbers / 2**20, abs=0.006), name


def scored(verb, path):
    """Run ``dpo-engine eval`` or ``reference``, with an out-of-memory error in scoring. Return exit code and stderr."""
    import importlib

    import torch

    from dpo_engine.cli import main

    def too_large(*rest, **named):
        raise torch.OutOfMemoryError(TORCHS + ADVICE)

    name = {"eval": "held_out_evaluator", "reference": "fill"}[verb]
    setattr(importlib.import_module(f"dpo_engine.verbs.{verb.replace('eval', 'evaluate')}"), name, too_large)
    sys.stderr = io.StringIO()
    return main([verb, str(path), *(["--step", "0"] if verb == "eval" else [])]), sys.stderr.getvalue()


@pytest.mark.parametrize(
    "verb, size, next_line",
    [
        ("eval", 2, "to use less memory, set one of reference.mode=stored, train.micro_batch_size=1"),
        ("reference", 2, "to use less memory, set one of train.micro_batch_size=1"),
        ("reference", 1, "use more ranks, or lower data.max_length; no other single change lowers this memory"),
    ],
)
def test_scoring_ends_with_what_to_change(verb, size, next_line, files, tiny_hf, tmp_path):
    sections = {"train": {"micro_batch_size": size}, "model": {"dtype": "fp32"}}
    sections["reference"] = {"mode": "stored" if verb == "reference" else "resident"}
    path = write_run(tmp_path, "run", files, tiny_hf, sections)
    ((code, errors),) = run_ranks(scored, 1, verb=verb, path=path)
    assert code == 1, errors
    trace, first, kept, change = errors.rstrip().rsplit("\n", 3)
    assert trace.startswith("Traceback") and first == TORCHS and change == next_line
    numbers = sum(
        tensor.numel() for tensor in load_file(tiny_hf("llama", num_hidden_layers=2) / "model.safetensors").values()
    )
    found = re.fullmatch(r"weights of a model on this rank: ([\d.]+) MiB; largest micro-batch: [\d,]+ tokens", kept)
    assert float(found[1]) == pytest.approx(4 * numbers / 2**20, abs=0.006)


@pytest.fixture
def arch(tiny_hf):
    return read_architecture(str(tiny_hf("llama")))


def named(arch, world, dtype="bf16", **sections):
    raw = {"model": {"path": "none"}, "data": {"train": "none.jsonl", "max_length": 4096}}
    raw |= {"train": {"output_dir": "none", "micro_batch_size": 4}, **sections}
    config, dims = Config.parse(raw), ParallelDims(world=world)
    tokens = largest_micro_batch(config, arch, dims, dtype=dtype, device_memory=None)
    found = savings(config, arch, dims, dtype=dtype, tokens=tokens)
    assert all(cost.peak < memory(config, arch, dims, dtype=dtype, tokens=tokens).peak for _, cost in found)
    return [change.name for change, _ in found]


def test_changes_are_named_in_the_order_of_their_cost(arch, monkeypatch):
    """`PIECE` is the largest number of elements that an optimizer converts at a time.

    The test sets `PIECE` to a small number. The buffers for these elements are then smaller than the gradients, as in a
    large model.
    """
    monkeypatch.setattr("dpo_engine.model.memory.PIECE", 1000)
    assert named(arch, 2) == [
        "reference.mode=stored",
        "train.micro_batch_size=2",
        "train.micro_batch_size=1",
        "optim.gradients=bf16",
        "model.recompute=selective",
        "model.recompute=full",
        "optim.states=host",
        "parallel.tp=2",
        "parallel.pp=2",
        "parallel.cp=2",
    ]


def test_only_changes_that_are_possible_and_save_memory_are_named(arch):
    reference, recompute = {"reference": {"mode": "stored"}}, {"model": {"path": "none", "recompute": "selective"}}
    assert named(arch, 1, dtype="fp32", **reference, **recompute) == [
        "train.micro_batch_size=2",
        "train.micro_batch_size=1",
        "model.recompute=full",
    ]


def test_a_budget_of_tokens_is_halved_unless_the_longest_pair_needs_it(arch):
    def budget(tokens):
        batch, train = {"tokens_per_micro_batch": tokens}, {"output_dir": "none"}
        return [name for name in named(arch, 1, batch=batch, train=train) if "micro_batch" in name]

    assert budget(16384) == ["batch.tokens_per_micro_batch=8192"] and budget(8192) == []
