"""Tests of the checks for differences between ranks.

Facts are named values, such as settings and versions, that must be equal on all ranks. They are compared through the
rendezvous store or by a collective. Weights are compared by a collective. If settings, data or weights differ between
ranks, all ranks must raise an error that names the difference.
"""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dpo_engine.errors import ConfigError, DataError, EngineError
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config
from dpo_engine.training import fingerprints, rank_guard
from dpo_engine.training.fingerprints import fingerprint
from dpo_engine.training.rank_guard import (
    SWITCHES,
    RankGuard,
    by_value,
    compare_at_rendezvous,
    environment,
    ranks_text,
)

FACTS = {"config": {"loss.beta": "0.1", "optim.lr": "1e-06"}, "code": {"torch": "2.13"}, "environment": {}}


class TestWords:
    @pytest.mark.parametrize(
        "ranks, says", [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2 and 5"), ([0, 2, 4], "ranks 0, 2 and 4")]
    )
    def test_ranks(self, ranks, says):
        assert ranks_text(ranks) == says

    def test_values(self):
        values = {0: "0.2", 1: "0.1", 2: "0.1", 3: None}
        assert by_value(values) == "0.1 on ranks 1-2, 0.2 on rank 0, not set on rank 3"
        long = {0: "a" * 70, 1: "a" * 70 + "b"}
        assert by_value(long) == f"{long[0]} on rank 0, {long[1]} on rank 1", "the difference must be visible"
        assert by_value({0: "a" * 70}) == "a" * 57 + "... on rank 0"
        assert by_value(dict(enumerate("abcdef"))) == "a on rank 0, b on rank 1, c on rank 2, and 3 more"


class TestEnvironment:
    def test_only_variables_that_change_numbers_are_compared(self):
        counts = {"NVTE_FLASH_ATTN": "0", "NCCL_ALGO": "Ring", "NCCL_MIN_NCHANNELS": "4", "DPO_KERNELS": "head=eager"}
        ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3", "NCCL_SOCKET_IFNAME": "eth0", "HOME": "h"}
        logs = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2", "NCCL_DEBUG": "INFO", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
        assert environment({**counts, **ours, **logs}) == counts

    def test_each_switch_has_a_reason(self):
        assert all(len(reason) > 20 for reason in SWITCHES.values())


def at_rendezvous(facts, worlds):
    """Run the ranks as threads that share a store. Return for each rank the class and lines of its error, or None."""
    store, found = dist.HashStore(), {}

    def rank_of(rank):
        try:
            compare_at_rendezvous(store, rank, worlds[rank], facts[rank])
            found[rank] = None
        except EngineError as error:
            found[rank] = type(error), error.problems

    threads = [threading.Thread(target=rank_of, args=(rank,), daemon=True) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == len(facts), "no rank may be left waiting"
    return [found[rank] for rank in range(len(facts))]


class TestRendezvous:
    def test_equal_ranks_continue(self):
        assert at_rendezvous([FACTS] * 3, [3] * 3) == [None] * 3
        compare_at_rendezvous(dist.HashStore(), 0, 1, FACTS)

    def test_difference_is_reported_on_all_ranks(self):
        other = {**FACTS, "config": {"loss.beta": "0.2", "optim.lr": "1e-06"}}
        expected = [
            "loss.beta: 0.1 on ranks 0-1 and 3, 0.2 on rank 2; start all ranks with the same run file and overrides"
        ]
        assert at_rendezvous([FACTS, FACTS, other, FACTS], [4] * 4) == [(ConfigError, expected)] * 4

    def test_environment_variable_is_reported_with_its_reason(self):
        other = {**FACTS, "environment": {"NCCL_ALGO": "Ring"}}
        expected = [
            "NCCL_ALGO: not set on rank 0, Ring on rank 1; it affects the order of additions, and a mismatch makes "
            "ranks hang; set it to the same value on all nodes"
        ]
        assert at_rendezvous([FACTS, other], [2, 2]) == [(ConfigError, expected)] * 2

    def test_long_lists_of_differences_are_shortened(self):
        other = {**FACTS, "config": {f"key{i}": "1" for i in range(30)}}
        (_, lines), _ = at_rendezvous([FACTS, other], [2, 2])
        assert len(lines) == 11 and lines[-1] == "further differences between ranks: 22"

    @pytest.mark.parametrize("worlds", [[2, 4], [4, 2], [2, 2, 4], [4, 4, 2]], ids=str)
    def test_wrong_number_of_ranks_is_reported_without_a_long_wait(self, worlds, monkeypatch):
        monkeypatch.setattr(rank_guard, "READ_WITHIN_S", 0.2)
        outcomes = at_rendezvous([FACTS] * len(worlds), worlds)
        wrong = [outcome for outcome in outcomes if outcome]
        assert wrong and all(kind is ConfigError for kind, _ in wrong)
        assert all(lines[0].startswith("number of ranks: ") and "2 on rank" in lines[0] for _, lines in wrong)
        assert (None in outcomes) == (worlds == [2, 2, 4]), (
            "with the world sizes 2, 2 and 4, the first two ranks form a complete job"
        )


TENSORS = st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=40)


class TestFingerprint:
    @given(TENSORS, st.data())
    def test_one_bit_changes_the_fingerprint(self, values, data):
        tensor = torch.tensor(values, dtype=torch.float32)
        flipped = tensor.clone()
        place, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 31))
        flipped.view(torch.int32)[place] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
        assert int(fingerprint(tensor)) == int(fingerprint(tensor.clone())) != int(fingerprint(flipped))

    @given(TENSORS)
    def test_swapped_elements_change_the_fingerprint(self, values):
        tensor = torch.tensor(values, dtype=torch.float32)
        exchanged = tensor.flip(0)
        same = (tensor.view(torch.int32) == exchanged.view(torch.int32)).all()
        assert (int(fingerprint(tensor)) == int(fingerprint(exchanged))) == same

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_fingerprint_depends_only_on_the_values(self, dtype):
        storage = torch.randn(101, dtype=dtype)
        assert int(fingerprint(storage[1:])) == int(fingerprint(storage[1:].clone()))

    def test_swapped_blocks_change_the_fingerprint(self, monkeypatch):
        monkeypatch.setattr(fingerprints, "BLOCK", 16)
        tensor = torch.randn(100)
        swapped = torch.cat([tensor[16:32], tensor[:16], tensor[32:]])
        assert int(fingerprint(tensor)) != int(fingerprint(swapped)) and int(fingerprint(tensor[:16])) != 0


def guarded(config, *, harm=None, facts=None, times=0):
    """Build the policy, apply ``harm`` and ``facts`` if they are given, and compare the ranks.

    Then repeat the comparison ``times`` times. If a comparison raises an error, return the name of the error's class
    and the error's lines. Otherwise return a list with the duration of each repetition in seconds.

    harm   (rank, local parameter name): one bit of this parameter is flipped on this rank
    facts  for each rank, facts to add to the engine's facts; they replace facts of the same names
    times  number of repetitions
    """
    from dpo_engine.training.engine import Engine

    engine = Engine.open(config)
    chunks = engine.load_model(config.model.path)
    known = {**engine.rank_facts, **(facts or {}).get(dist.get_rank(), {})}
    guard = RankGuard(known, engine.arch, engine.groups, engine.platform.device)
    if harm and dist.get_rank() == harm[0]:
        (parameter,) = [p for chunk in chunks for name, p in chunk.named_parameters() if name == harm[1]]
        parameter.data.view(torch.int32).view(-1)[-1] ^= 1
    models = {"policy": chunks}
    try:
        guard.check(models, step=7)
        seconds = []
        for _ in range(times):
            dist.barrier()
            started = time.perf_counter()
            guard.check(models)
            seconds.append(time.perf_counter() - started)
        return seconds
    except EngineError as error:
        return type(error).__name__, error.problems
    finally:
        engine.close()


NORM, MATRIX, EMBEDDING = (
    "decoder.layers.0.pre_mlp_layernorm.weight",
    "decoder.layers.1.mlp.linear_fc1.weight",
    "embedding.word_embeddings.weight",
)


@pytest.mark.parametrize(
    "ranks, layout, harm, says",
    [
        (2, {}, (1, MATRIX), f"{MATRIX} differ: "),
        (2, {"cp": 2}, (0, MATRIX), f"{MATRIX} differ: "),
        (2, {"tp": 2}, (1, NORM), f"{NORM} differ: "),
        (4, {"tp": 2}, (3, MATRIX), f"{MATRIX} differ: "),
        (2, {"pp": 2}, (0, EMBEDDING), f"{EMBEDDING} differ: "),
        (4, {"pp": 2, "tp": 2}, (1, EMBEDDING), f"{EMBEDDING} differ: "),
    ],
    ids=["dp2", "cp2", "tp2 norm", "tp2 dp2", "pp2 tied", "tp2 pp2 tied"],
)
def test_one_flipped_bit_in_one_replica_is_found(ranks, layout, harm, says, tiny_hf, tmp_path):
    model = tiny_hf("llama", num_hidden_layers=2, tie_word_embeddings=harm[1] == EMBEDDING)
    config = run_config(model, tmp_path, parallel=layout)
    assert run_ranks(guarded, ranks, config=config) == [[]] * ranks, "equal copies must pass"
    outcomes = run_ranks(guarded, ranks, config=config, harm=harm)
    kind, (line,) = outcomes[0]
    assert kind == "NumbersError" and line.startswith(f"step 7: copies of policy {says}") and len(line) < 220
    assert "; restart from the last checkpoint" in line and f"rank {harm[0]}" in line
    assert outcomes == [outcomes[0]] * ranks


@pytest.mark.parametrize(
    "kind, error",
    [("config", ConfigError), ("tokenizer", ConfigError), ("data", DataError)],
)
def test_differing_fact_is_named_with_its_error(kind, error, tiny_hf, tmp_path):
    config = run_config(tiny_hf("llama", num_hidden_layers=2), tmp_path)
    others = {0: {kind: {"it": "a"}}, 1: {kind: {"it": "b"}}}
    outcomes = run_ranks(guarded, 2, config=config, facts=others)
    assert outcomes[0] == outcomes[1] and outcomes[0][0] == error.__name__
    assert "it: a on rank 0, b on rank 1; " in "\n".join(outcomes[0][1])


def test_eight_ranks_compare_within_a_second(tiny_hf, tmp_path):
    config = run_config(tiny_hf("llama", num_hidden_layers=2), tmp_path, parallel={"tp": 2})
    seconds = run_ranks(guarded, 8, config=config, times=3)
    assert min(map(max, zip(*seconds, strict=True))) < 1
