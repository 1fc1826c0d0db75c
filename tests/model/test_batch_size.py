"""Tests of the automatic layout and size of micro-batches.

The size depends mainly on the number of tokens that keeps a device busy, the number of pipeline stages, the number of
tokens in a step, the length of the longest pair, and the device's memory.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_engine.model.architecture import Architecture
from dpo_engine.model.batch_size import ENOUGH, OVERHEAD, choose_tokens, largest_micro_batch, settle_batches
from dpo_engine.model.memory import GIB, memory
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.trajectory import run_config

LLAMA_8B = Architecture(
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_hidden_size=14336,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=5e5,
    qkv_bias=False,
    qk_norm=False,
    rope_scaling=None,
    tied_embeddings=False,
    max_positions=131072,
)


def config(tmp_path, layout="auto", **sections):
    return run_config("m", tmp_path, batch={"layout": layout}, train={"micro_batch_size": None}, **sections)


def choose(tmp_path, dims=None, *, gib=None, longest=100, per_step=1e6, **sections):
    size = None if gib is None else int(gib * GIB)
    facts = {"dtype": "bf16", "device_memory": size, "longest": longest, "per_step": per_step}
    return choose_tokens(config(tmp_path, **sections), LLAMA_8B, dims or ParallelDims(), **facts)


class TestChoice:
    def test_there_is_enough_work_for_the_device(self, tmp_path):
        assert choose(tmp_path) == (ENOUGH["cpu"], "more would save little time")
        assert choose(tmp_path, gib=250) == (
            ENOUGH["gpu"],
            "more would save little time, and the memory estimate is below 92% of 250.0 GiB of device memory",
        )

    def test_each_context_parallel_rank_has_enough(self, tmp_path):
        assert choose(tmp_path, ParallelDims(cp=4, world=4))[0] == 4 * ENOUGH["cpu"]

    @pytest.mark.parametrize("pp, vpp", [(2, None), (4, None), (4, 2)])
    def test_pipelines_get_the_cheapest_number_of_micro_batches(self, pp, vpp, tmp_path):
        """A step's expected cost is its work, plus the pipeline's bubble, plus an overhead for each micro-batch."""
        work, each = 20_000.0, OVERHEAD["cpu"]
        costs = {m: work * (1 + (pp - 1) / (m * (vpp or 1))) + m * each for m in range(1, 2000)}
        best = min(costs, key=costs.__getitem__)
        tokens, reason = choose(tmp_path, ParallelDims(pp=pp, vpp=vpp, world=pp), per_step=work)
        assert costs[math.ceil(work / tokens)] == pytest.approx(costs[best], rel=0.001)
        assert reason == "with more, pipeline stages would be idle for too large a part of a step"

    def test_large_steps_in_a_pipeline_are_limited_by_what_is_enough(self, tmp_path):
        assert choose(tmp_path, ParallelDims(pp=2, world=2), per_step=1e7)[0] == ENOUGH["cpu"]

    @pytest.mark.parametrize("gib", [None, 250])
    def test_the_longest_pair_has_room(self, gib, tmp_path):
        tokens, reason = choose(tmp_path, gib=gib, longest=9000)
        assert tokens == 9000 and reason.startswith("this is the length of the longest pair")

    @pytest.mark.parametrize("recompute", ["none", "selective", "full"])
    def test_memory_is_filled_but_not_exceeded(self, recompute, tmp_path):
        dims, model = ParallelDims(tp=2, world=8), {"path": "m", "recompute": recompute}
        asked = config(tmp_path, model=model)
        state = memory(asked, LLAMA_8B, dims, dtype="bf16", tokens=0).needed
        for extra in (2, 3, 5):
            gib = state / GIB / 0.92 + extra
            tokens, reason = choose(tmp_path, dims, gib=gib, model=model)
            if tokens == ENOUGH["gpu"]:
                assert recompute != "none"
                continue
            assert reason == (
                f"as many as fit into 92% of {gib:.1f} GiB of device memory, according to the memory estimate"
            )
            needed = [memory(asked, LLAMA_8B, dims, dtype="bf16", tokens=t).needed for t in (tokens, tokens + 256)]
            assert needed[0] <= 0.92 * gib * GIB < needed[1]

    def test_a_pair_without_room_is_named(self, tmp_path):
        tokens, reason = choose(tmp_path, gib=20, longest=1000)
        assert tokens == 1000 and reason == (
            "this is the length of the longest pair, although 92% of 20.0 GiB of device memory has room for only 0 "
            "tokens, according to the memory estimate"
        )


def settle(asked, *lengths, dims=None, device_memory=None, slow_trees=False):
    pairs = SimpleNamespace(lengths=np.array(lengths), prompt_keys=np.arange(len(lengths)))
    facts = {"dtype": "bf16", "device_memory": device_memory, "slow_trees": slow_trees}
    settled, lines = settle_batches(asked, LLAMA_8B, dims or ParallelDims(), pairs, **facts)
    return settled.batch.layout, settled.batch.tokens_per_micro_batch, lines


class TestSettled:
    def test_both_values_are_chosen_and_logged(self, tmp_path):
        layout, tokens, lines = settle(config(tmp_path), *[(60, 20, 20)] * 99)
        assert (layout, tokens) == ("tree", ENOUGH["cpu"])
        assert lines[0].startswith("batch layout: tree; stacked computes 1.60x as many tokens as tree")
        assert lines[1] == f"micro-batches: at most {tokens:,} tokens; more would save little time"

    @pytest.mark.parametrize(
        "layout, share, longest", [("stacked", True, 3200), ("tree", True, 2100), ("tree", False, 2700)]
    )
    def test_length_of_the_longest_pair_depends_on_the_layout(self, layout, share, longest, tmp_path):
        asked = config(tmp_path, layout)
        asked = asked.model_copy(update={"batch": asked.batch.model_copy(update={"share": share})})
        assert settle(asked, (600, 1000, 500), (10, 10, 10))[:2] == (layout, longest)

    def test_pipelines_consider_the_tokens_of_one_rank(self, tmp_path):
        asked = config(tmp_path, "tree", data={"train": "a", "max_length": 64})
        for dp in (1, 4):
            _, tokens, _ = settle(asked, *[(10, 10, 10)] * 640, dims=ParallelDims(pp=4, world=4 * dp))
            assert tokens == int(math.sqrt(64 / dp * 30 * OVERHEAD["cpu"] / 3))

    def test_explicit_sizes_are_kept(self, tmp_path):
        for size in ({"micro_batch_size": 3}, {}):
            batch = {"layout": "stacked", "tokens_per_micro_batch": "auto" if size else 77}
            asked = run_config("m", tmp_path, batch=batch, train={"micro_batch_size": None, **size})
            assert settle(asked, (60, 20, 20)) == (
                "stacked",
                batch["tokens_per_micro_batch"],
                ["batch layout: stacked; as configured"],
            )

    def test_the_choice_is_the_same_for_the_same_inputs(self, tmp_path):
        """A resumed run chooses again from the same inputs, and must get the same result."""
        pairs = [(60, 20, 20), (3, 50, 4)] * 20
        found = [settle(config(tmp_path), *pairs, device_memory=80 * GIB) for _ in range(2)]
        assert found[0] == found[1]


def test_unknown_pairs_are_assumed_to_have_the_maximum_length(tmp_path):
    def largest(dims=None, memory=None, **train):
        asked = run_config("m", tmp_path, data={"max_length": 300}, train={"micro_batch_size": None, **train})
        return largest_micro_batch(asked, LLAMA_8B, dims or ParallelDims(), dtype="bf16", device_memory=memory)

    assert largest(micro_batch_size=5) == 5 * 600
    assert largest() == ENOUGH["cpu"] and largest(memory=250 * GIB) == ENOUGH["gpu"]
    assert largest(memory=0) == 600
    # With 32 ranks, each rank has two pairs in a step.
    assert largest(ParallelDims(world=32), memory=250 * GIB) == 1200
    overlap = {"transformer": {"tp_comm_overlap": True}}
    padded = run_config("m", tmp_path, data={"max_length": 300}, train={"micro_batch_size": None}, megatron=overlap)
    facts = {"dtype": "bf16", "device_memory": 250 * GIB}
    assert largest_micro_batch(padded, LLAMA_8B, ParallelDims(world=32), **facts) == ENOUGH["gpu"], (
        "with tp_comm_overlap, all rows must be padded to the chosen size, even if a step's pairs have fewer tokens"
    )
    asked = run_config("m", tmp_path, batch={"tokens_per_micro_batch": 77}, train={"micro_batch_size": None})
    assert largest_micro_batch(asked, LLAMA_8B, ParallelDims(), dtype="bf16", device_memory=None) == 77
