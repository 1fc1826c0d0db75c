"""Tests of planned layouts: the layouts that fit, their costs, and the suggestions in the report if none fits."""

import json
import re

import pytest

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.batch_size import largest_micro_batch
from dpo_engine.model.memory import GIB, memory
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.verbs.plan import plan

LLAMA_8B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
)


@pytest.fixture
def run(tmp_path):
    """Return a function that makes the configuration of an 8B model with rows of 4,096 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(**sections):
        raw = {"model": {"path": str(tmp_path)}, "data": {"train": "a", "max_length": 4096}}
        raw["train"] = {"output_dir": "o"}
        return Config.parse({name: {**raw.get(name, {}), **sections.get(name, {})} for name in raw | sections})

    return make


def ranked(lines):
    """Return (tp, pp, cp, dp, GiB, seconds) of each numbered line."""
    pattern = r"\d+\. tp (\d+), pp (\d+).*?, cp (\d+), dp (\d+).*?: ([\d.]+) GiB, about ([\d.e+]+) s"
    return [tuple(map(float, found.groups())) for line in lines if (found := re.match(pattern, line))]


def test_layouts_are_ranked_and_fit(run):
    lines = plan(run(), 8)
    found = ranked(lines)
    assert len(found) == 5 and re.match(r"llama on 8 x H100 with 80 GiB: layouts that fit: \d+; rows of 4,", lines[0])
    assert all(tp * pp * cp * dp == 8 and size <= 80 for tp, pp, cp, dp, size, _ in found)
    assert [seconds for *_, seconds in found] == sorted(seconds for *_, seconds in found)
    # Without the input embedding, the model has about 7.5e9 parameters. Training takes 6 x 7.5e9 operations per token,
    # and the reference takes 2 x 7.5e9. Each of the 8 GPUs is assumed to compute at half of its peak.
    least = 64 * 2 * 4096 * 8 * 7.5e9 / (8 * 989e12 / 2)
    assert all(least < seconds < 1.3 * least for *_, seconds in found)


def test_memory_is_that_of_check_and_the_keys_give_the_layout(run):
    lines = plan(run(), 8)
    tp, pp, cp, _, size, _ = ranked(lines)[0]
    shown = "\n".join(lines[lines.index("to use the first layout:") :])
    keys = dict(re.findall(r"^  (\w+): (\d+)$", shown, re.MULTILINE))
    sizes = {name: int(value) for name, value in keys.items()}
    assert (sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("cp", 1)) == (tp, pp, cp)
    config = run(parallel=sizes)
    dims = ParallelDims(int(tp), int(pp), sizes.get("vpp"), int(cp), 1, 8)
    arch = read_architecture(config.model.path)
    tokens = largest_micro_batch(config, arch, dims, dtype="bf16", device_memory=80 * GIB)
    assert size == pytest.approx(memory(config, arch, dims, dtype="bf16", tokens=tokens).needed / GIB, abs=0.06)
    assert f"; micro-batches of at most {tokens:,} tokens" in lines[2]


def test_recomputation_is_proposed_only_where_it_is_needed(run):
    for gpu_memory, expected in [(200, "dp 1: "), (180, "dp 1, recompute selective: ")]:
        (line,) = [line for line in plan(run(), 1, gpu_memory=gpu_memory) if line.startswith("1. ")]
        assert line.startswith(f"1. tp 1, pp 1, cp 1, {expected}")


def test_what_would_fit_is_said(run):
    lines = plan(run(), 1)
    assert "layouts that fit: 0" in lines[0]
    assert lines[1].startswith("does not fit; the smallest layout is tp 1, pp 1, cp 1")
    assert lines[2] == "what would fit: optim.states=host or 4 GPUs"
    moved = plan(run(optim={"states": "host"}), 1)
    assert ranked(moved) and "; host memory: 179.74 GiB = optimizer states 89.75 GiB + buffers 0.25 GiB" in moved[2]
    assert "update on the host 1.61" in moved[3]  # 8.03e9 parameters at 5e9 per second
    stored = plan(run(), 4, gpu_memory=39)
    assert "what would fit: reference.mode=stored" in stored[2]
    sized = plan(run(batch={"tokens_per_micro_batch": 10**6}), 8, gpu_memory=40)
    assert "what would fit: batch.tokens_per_micro_batch=auto" in sized[2]


def test_reasons_against_layouts(run):
    lines = plan(run(train={"global_batch_size": 8}), 16)
    assert "not possible: dp 16: is larger than train.global_batch_size (8)" in lines
    assert "not possible: tp 16: tensor parallelism is too slow between nodes of 8 GPU(s)" in lines


def test_windows_reduce_the_operations(run, tmp_path):
    """With a window of w tokens in rows of n tokens, a token sees w - w * w / 2n keys on average, instead of n / 2."""

    def operations():
        first, *lines = plan(run(data={"max_length": 65536}), 64)[1:4]
        (line,) = [line for line in lines if "PFLOP" in line]
        assert "recompute" not in first or "selective" in first
        return float(re.search(r"([\d.e+]+) PFLOP", line)[1])

    full = operations()
    narrow = LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(narrow))
    saved = 65536 / 2 - (4096 - 4096**2 / (2 * 65536))
    tokens = 2 * 65536 * 64
    # The first factor is the work in units of a forward pass: 1 for the policy's forward pass, 2 for its backward pass,
    # and 1 for the reference. The tolerance allows for the report's three digits.
    assert full - operations() == pytest.approx(4 * 4 * 32 * 4096 * saved * tokens / 1e15, rel=0.02)


def test_131072_tokens_are_planned_within_memory(run, tmp_path):
    """With cp 8 and stored reference log-probabilities, an 8B model fits in the memory of eight GPUs of 80 GiB.

    The model has sliding windows, and each row has up to 131,072 tokens.
    """
    narrow = LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(narrow))
    config = run(
        data={"max_length": 131072}, train={"global_batch_size": 8}, reference={"mode": "stored", "store": "s"}
    )
    lines = plan(config, 8)
    best = [found for found in ranked(lines) if found[2] == 8]
    assert best and all(size <= 80 for *_, size, _ in best), lines


def test_gpus_that_do_not_fill_the_nodes_are_refused(run):
    with pytest.raises(ConfigError, match=r"--gpus=12: must be a multiple of the number of nodes \(8\); change --gpus"):
        plan(run(), 12, nodes=8)


@pytest.mark.parametrize(
    "gpus, options, expected",
    [
        (8, {"gpu_memory": float("nan")}, "--gpu-memory=nan: must be positive and finite; pass the memory of one GPU"),
        (8, {"gpu_memory": float("inf")}, "--gpu-memory=inf: must be positive and finite; pass the memory of one GPU"),
        (8, {"gpu_memory": -1}, "--gpu-memory=-1: must be positive and finite; pass the memory of one GPU"),
        (8, {"nodes": 0}, "--nodes=0: must be at least 1; pass the number of nodes"),
        (0, {}, "--gpus=0: must be at least 1; pass the number of GPUs"),
        (-8, {"nodes": 1}, "--gpus=-8: must be at least 1; pass the number of GPUs"),
    ],
)
def test_numbers_that_describe_no_machine_are_refused(run, gpus, options, expected):
    with pytest.raises(ConfigError) as raised:
        plan(run(), gpus, **options)
    (line,) = raised.value.problems
    assert line.startswith(expected)
