"""Tests of ``model.cuda_graphs`` on a CPU, where torch's operations are recorded instead of a GPU's kernels.

``tests/nullgpu/test_null_gpu_graphs.py`` records the kernels of an emulated GPU that computes nothing.
"""

import numpy as np
import pytest
import torch

from dpo_engine.config.rules import contradictions
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, NumbersError
from dpo_engine.model import cuda_graphs, recording
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.cuda_graphs import graph_problems
from dpo_engine.model.memory import stage_memory
from dpo_engine.model.savings import lighter_runs
from dpo_engine.model.spec import choose_layers, describe_layers
from dpo_engine.platform.device import Platform
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from dpo_engine.training import engine as engine_module
from dpo_engine.training.engine import Engine
from dpo_engine.verbs import evaluate, export, reference
from support.family_cases import CASES
from support.layouts import LAYOUTS, world
from support.recorded_operations import Pool, RecordedOperations, replace_recordings

SIZES = [6, 5, 7]
ROW = 128
PLAIN = {"distributed_optimizer": False}
BATCH = {"layout": "tree", "tokens_per_micro_batch": 80}


def config_for(start, out, /, *, graphs=True, **sections):
    sections["model"] = {"path": str(start), "cuda_graphs": graphs, **sections.get("model", {})}
    return run_config(start, out, **{"batch": BATCH, **sections})


def fixed_rows(config, *, spoil=None, **arguments):
    """Train on a CPU with rows of a fixed size.

    spoil    called before the run, to plant a bug
    Returns  the results, and the number of replays on this rank
    """
    from dpo_engine.batching.blocks import padded_length

    replace_recordings()
    if spoil:
        spoil()
    engine_module.choose_layers = lambda *given: "native"
    opened, attached, chunks = engine_module.Engine.open, engine_module.attach_graphs, []

    def opening(*given, **named):
        engine = opened(*given, **named)
        dims = engine.groups.dims
        engine.row_tokens = padded_length(ROW, dims.cp, dims.share_multiple(engine.sequence_parallel))
        return engine

    def attaching(given, config):
        attached(given, config)
        chunks.extend(given)

    engine_module.Engine.open, engine_module.attach_graphs = opening, attaching
    found = train_steps(config, **arguments)
    assert not any(chunk.graphs and chunk.graphs._slots for chunk in chunks), "all recordings must be freed at the end"
    return found, RecordedOperations.replays


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    config = run_config(tiny_hf("llama"), out, parallel=PLAIN)
    return run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(out), few=3, fp64=True)[0], out


DEFAULT = ("one", "tp2 cp2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]
)
def test_graphs_change_no_number(name, expected, tiny_hf, tmp_path):
    config = config_for(tiny_hf("llama"), tmp_path, parallel=LAYOUTS[name] | PLAIN)
    given = {"config": config, "sizes": SIZES, "export": str(tmp_path), "few": 3, "fp64": True}
    for result, replays in run_ranks(fixed_rows, world(name, LAYOUTS[name]), **given):
        assert replays > 0
        assert_same_numbers(result, expected[0], 1e-10)
    assert_same_weights(tmp_path, expected[1], tiny_hf("llama"), 1e-10)


UPPER = {"targets": "all-linear", "layers": [1, 2, 3], "rank": 4}
VARIANTS = {  # the case in family_cases, the number of ranks, and sections of the configuration
    "bf16": ("qwen3", 1, {"model": {"dtype": "bf16"}}),
    "bf16 gradients": ("qwen2", 1, {"model": {"dtype": "bf16"}, "optim": {"gradients": "bf16"}}),
    "gathers overlap": (
        "llama with biases",
        2,
        {
            "parallel": {"overlap": True},
            "megatron": {"ddp": {"bucket_size": 1}},  # a gather for each weight
        },
    ),
    "gathers are aligned": (
        "llama with biases",
        4,
        {
            "parallel": {"overlap": True, "pp": 2, "vpp": 2},
            "megatron": {"ddp": {"align_param_gather": True}},
        },
    ),
    "offloaded reference": ("qwen2", 1, {"reference": {"mode": "offloaded", "ahead": 1}}),
    "coupled loss": ("mistral", 1, {"loss": {"name": "aot"}}),
    "adapters": ("qwen3", 2, {"adapter": UPPER, "parallel": {"tp": 2}}),
    "dora": ("qwen3", 1, {"adapter": {**UPPER, "kind": "dora"}}),
    "only the last layer trains": ("qwen3", 1, {"adapter": {**UPPER, "layers": [3]}}),
    "frozen layers": ("qwen3", 1, {"optim": {"freeze": ["model.embed_tokens.*", "model.layers.[01].*"]}}),
    "one norm": ("cohere", 2, {"parallel": {"tp": 2}}),
    "one norm without rotation": ("cohere2", 1, {}),
    "parallel norms": ("gpt_neox", 1, {}),
    "learned positions": ("gpt2", 1, {}),
    "norms after": ("olmo2", 2, {"parallel": {"tp": 2}}),
    "four norms": ("gemma2", 1, {}),
    "two rotations": ("gemma3_text", 1, {}),
    "shared key heads": ("qwen3", 4, {"parallel": {"tp": 4}}),
}
DEFAULT_VARIANTS = ("gathers overlap", "adapters")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT_VARIANTS else pytest.mark.slow) for name in VARIANTS]
)
def test_graphs_change_no_bit(name, tiny_hf, tmp_path):
    case, ranks, sections = VARIANTS[name]
    family, fields = CASES[case]
    model, given = tiny_hf(family, **fields), {"sizes": SIZES, "few": 3}
    plain, recorded = (
        run_ranks(fixed_rows, ranks, config=config_for(model, tmp_path, graphs=graphs, **sections), **given)
        for graphs in (False, True)
    )
    assert [result for result, _ in recorded] == [result for result, _ in plain]
    assert not any(replays for _, replays in plain)
    if name == "only the last layer trains":
        # Three layers have no backward pass. Their recordings run in one forward pass, and are then freed.
        assert [replays for _, replays in recorded] == [3 * 2]
    else:
        assert all(replays > 3 * 2 for _, replays in recorded)


def replays_and_slots(config, pairs):
    """Train for three steps. Return the counts of replays and slots after each step, and the count of micro-batches.

    The replays are counted from the start of the training. The slots are counted for each model chunk. A slot contains
    the recordings of a chunk's layers for one micro-batch in flight.
    """
    from dpo_engine.testing.pairs import RandomPairs
    from dpo_engine.training.engine import batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    replace_recordings()
    engine_module.choose_layers = lambda *given: "native"
    engine = engine_module.Engine.open(config)
    engine.row_tokens = ROW
    data = RandomPairs(pairs, 515)
    trained, indices = engine.load_policy(total_steps=3), np.arange(pairs)
    reference = open_reference(engine, trained.chunks)
    batches, found = engine.batches(data, indices), []
    for _ in range(3):
        known = {"known": batch_facts(data, indices), "vocab_size": 515, "groups": engine.groups}
        train_step(trained, reference, batches, engine.objective, **known)
        slots = [len(chunk.module.graphs._slots) for chunk in trained.chunks]
        found.append((RecordedOperations.replays, slots))
    engine.close()
    return found, len(batches)


def test_slots_are_used_again_while_others_are_in_flight(tiny_hf, tmp_path):
    """In an interleaved schedule, several micro-batches of the same chunk can be in flight."""
    sections = {"parallel": {"pp": 2, "vpp": 2}, "train": {"micro_batch_size": 1}, "batch": {"layout": "tree"}}
    plain, recorded = (
        run_ranks(
            fixed_rows,
            2,
            config=config_for(tiny_hf("llama"), tmp_path, graphs=graphs, **sections),
            sizes=[12, 12, 12],
        )
        for graphs in (False, True)
    )
    assert [result for result, _ in recorded] == [result for result, _ in plain]


def norms_with_a_fault(config):
    return [step["grad_norm"] for step in fixed_rows(config, sizes=[6, 5, 7, 6])[0]["steps"]]


@pytest.mark.parametrize("occurrence", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_injected_fault_is_not_recorded(occurrence, tiny_hf, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_FAULT", f"gradient:0:{occurrence}:spike")
    plain, recorded = (
        run_ranks(norms_with_a_fault, 1, config=config_for(tiny_hf("llama"), tmp_path, graphs=graphs))
        for graphs in (False, True)
    )
    assert recorded == plain and max(plain[0]) == plain[0][occurrence - 1] > 50 * min(plain[0])


@pytest.mark.parametrize("parallel, slots", [({}, [[1]]), ({"pp": 2}, [[2], [1]])], ids=str)
def test_replays_and_slots(parallel, slots, tiny_hf, tmp_path):
    """Three of the model's four layers have recordings.

    From the second step on, each of these layers has four replays for each micro-batch.
    """
    config = config_for(tiny_hf("llama"), tmp_path, parallel=parallel, train={"micro_batch_size": 1})
    for rank, (found, batches) in enumerate(run_ranks(replays_and_slots, len(slots), config=config, pairs=12)):
        layers = 3 if not parallel else 2 - rank
        assert batches >= 3
        assert [replays for replays, _ in found] == [0, 4 * layers * batches, 8 * layers * batches]
        assert [count for _, count in found] == [[0], slots[rank], slots[rank]]


def keep_nothing():
    made = recording.Piece.__init__

    def make(piece, *given, kept, **named):
        made(piece, *given, kept=[], **named)

    recording.Piece.__init__ = make


def load_once():
    begin = cuda_graphs.Slot.begin

    def begin_once(slot, after):
        loaded = set(slot._loaded)
        begin(slot, after)
        slot._loaded = loaded

    cuda_graphs.Slot.begin = begin_once


def one_slot():
    begin = cuda_graphs.ChunkGraphs.begin_forward

    def reuse(graphs):
        graphs._free = list(graphs._slots)
        begin(graphs)

    cuda_graphs.ChunkGraphs.begin_forward = reuse


def use_without_a_replay():
    """Skip the first replay of the forward pass of each piece.

    A piece is a recorded part of a layer's work. Without the replay, the results of the piece are invalid, because a
    GPU computes nothing while its kernels are recorded.
    """
    from dpo_engine.model.recording import Piece

    call = Piece.__call__

    def skip(piece, *given):
        done = piece.__dict__.setdefault("done", [])
        if done:
            return call(piece, *given)
        done.append(True)
        replay, piece.forward.replay = piece.forward.replay, lambda: None
        found = call(piece, *given)
        piece.forward.replay = replay
        return found

    Piece.__call__ = skip


def share_gradients():
    """Let pieces return their buffers instead of copies."""
    torch.Tensor.clone = lambda tensor, **given: tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, parallel",
    [(keep_nothing, {}), (load_once, {}), (one_slot, {"pp": 2}), (use_without_a_replay, {}), (share_gradients, {})],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_memory_that_is_no_longer_valid_is_noticed(spoil, parallel, tiny_hf, tmp_path):
    """Plant a bug that breaks one of the rules for the memory of recordings.

    The numbers of the last step must then change. This shows that the tests above would notice the bug.
    """
    given = {"sizes": [12, 12, 12]}
    results = []
    for planted in (None, spoil):
        config = config_for(tiny_hf("llama"), tmp_path, parallel=parallel)
        results.append(run_ranks(fixed_rows, 1 + ("pp" in parallel), config=config, spoil=planted, **given))
    right, wrong = ([result["steps"][-1] for result, _ in ranks] for ranks in results)
    assert right != wrong


def test_rows_of_another_size_are_refused(monkeypatch):
    monkeypatch.setattr(recording, "new_pool", Pool)
    slot = cuda_graphs.Slot(recording.SharedMemory())
    slot._load("x", torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"^x: the shape is \[2\], but \[3\] was recorded$"):
        slot._load("x", torch.zeros(2))


def parsed(**sections):
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"output_dir": "o"}, "batch": {"layout": "tree"}}
    return Config.model_validate({key: {**raw.get(key, {}), **sections.get(key, {})} for key in {**raw, **sections}})


ON = {"cuda_graphs": True}
FP8 = {"transformer": {"fp8": "e4m3", "fp8_recipe": "blockwise"}}
REFUSALS = [
    (
        {"model": ON, "batch": {"layout": "auto"}},
        "requires rows of one size, which only the tree layout has, but batch.layout is auto; set "
        "batch.layout=tree, or remove model.cuda_graphs",
    ),
    (
        {"model": {**ON, "recompute": "full"}},
        "what a graph computes cannot be recomputed, but model.recompute is full; set model.recompute=none, or remove "
        "model.cuda_graphs",
    ),
    (
        {"model": {**ON, "spec": "te"}, "megatron": FP8},
        "has never been tested with megatron.transformer.fp8; remove one of them",
    ),
    (
        {
            "model": {**ON, "spec": "te"},
            "parallel": {"tp": 2},
            "megatron": {"transformer": {"tp_comm_overlap": True}},
        },
        "has never been tested with megatron.transformer.tp_comm_overlap; remove one of them",
    ),
]


@pytest.mark.parametrize("sections, line", REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals(sections, line):
    assert contradictions(parsed(**sections)) == [f"model.cuda_graphs=true: {line}"]


def test_accepted_settings():
    assert contradictions(parsed(model=ON)) == []


@pytest.mark.parametrize("verb", [evaluate.evaluate, export.export, reference.score_reference])
def test_verbs_that_do_not_train_use_no_graphs(verb, monkeypatch):
    """With graphs, these verbs could not run on a machine without a GPU, and all rows would be padded for nothing."""
    opened = []

    def stop(config):
        opened.append(config)
        raise ConfigError("stopped")

    monkeypatch.setattr(Engine, "open", stop)
    sections = {"reference": {"mode": "stored"}, "data": {"train": "t", "validation": "v"}}
    with pytest.raises(ConfigError, match="stopped"):
        verb(parsed(model=ON, **sections))
    (config,) = opened
    assert config == parsed(**sections)


def test_graphs_are_freed_after_an_error(monkeypatch):
    """If all ranks have the same error, they destroy their process groups.

    The graphs must be freed first, because NCCL would wait for graphs that still exist.
    """
    freed = []
    monkeypatch.setattr(engine_module, "close_graphs", lambda: freed.append("graphs"))
    monkeypatch.setattr(engine_module, "close_groups", lambda: freed.append("groups"))
    with pytest.raises(NumbersError):
        try:
            raise NumbersError("not finite")
        finally:
            Engine.close(None)
    assert freed == ["graphs", "groups"]


def test_suggested_savings_of_memory_are_valid_settings(tiny_hf):
    """With graphs, recomputation is refused, so it must not be suggested. Removing the graphs is suggested instead."""
    config = parsed(model=ON, data={"train": "t", "max_length": 64})
    changes = [*lighter_runs(config, ParallelDims(), dtype="bf16", tokens=256)]
    assert "model.cuda_graphs=false" in [change.name for change in changes]
    assert not any("recompute" in change.name for change in changes)
    assert [contradictions(change.config) for change in changes] == [[]] * len(changes)


@pytest.mark.parametrize(
    "family, fields, why",
    [
        ("qwen3_moe", {"head_dim": 16}, "the number of tokens of an expert is different in every micro-batch"),
        (
            "llama",
            {"num_hidden_layers": 1},
            "the model has one layer, and the last layer has no graphs, because the number of tokens that it computes "
            "varies",
        ),
    ],
)
def test_refusals_for_a_model(family, fields, why, tiny_hf):
    arch = read_architecture(str(tiny_hf(family, **fields)))
    assert graph_problems(parsed(model=ON), arch) == [f"model.cuda_graphs=true: {why}; remove model.cuda_graphs"]
    assert graph_problems(parsed(), arch) == []
    platform = Platform(torch.device("cpu"), "nccl", gpu=True)
    with pytest.raises(ConfigError, match=why):
        choose_layers(parsed(model=ON), arch, ParallelDims(), platform, torch.bfloat16)


def test_latent_attention_is_refused(tiny_hf):
    """The model with latent attention also has experts, so graphs are refused for two reasons."""
    arch = read_architecture(str(tiny_hf(CASES["deepseek_v3"][0], **CASES["deepseek_v3"][1])))
    assert graph_problems(parsed(model=ON), arch)[1:] == [
        "model.cuda_graphs=true: latent attention has never been tested with graphs; remove model.cuda_graphs"
    ]


def test_a_machine_without_a_gpu_is_refused(tiny_hf):
    arch, platform = read_architecture(str(tiny_hf("llama"))), Platform(torch.device("cpu"), "gloo", gpu=False)
    with pytest.raises(ConfigError) as found:
        choose_layers(parsed(model=ON), arch, ParallelDims(), platform, torch.float32)
    assert found.value.problems == [
        "model.cuda_graphs=true: requires a GPU, but this machine has none; remove model.cuda_graphs"
    ]


def test_the_log_names_graphs(tiny_hf):
    arch = read_architecture(str(tiny_hf("llama")))
    line = "layer spec native (torch norms), bfloat16"
    assert describe_layers(parsed(), arch, "native", "bfloat16") == line
    assert describe_layers(parsed(model=ON), arch, "native", "bfloat16") == (
        f"{line}, CUDA graphs before and after attention"
    )


def test_estimated_memory(tiny_hf):
    """With graphs, the activations also stay in memory during an update.

    The estimate therefore adds the memory of the activations to the memory of the update or to the working memory,
    whichever of these two is larger.
    """
    arch = read_architecture(str(tiny_hf("llama")))
    sections = {"data": {"train": "t", "max_length": 64}, "optim": {"gradients": "bf16"}}
    sections["parallel"] = {"distributed_optimizer": False}
    plain, graphs = (
        stage_memory(parsed(model={"cuda_graphs": on}, **sections), arch, ParallelDims(), 0, "bf16", 128)
        for on in (False, True)
    )
    assert graphs.graphs > 0 == plain.graphs and graphs.activations == plain.activations
    during = graphs.activations + max(graphs.working, graphs.update)
    assert graphs.peak == graphs.constant + graphs.graphs + during
    assert plain.peak == plain.constant + max(plain.activations + plain.working, plain.update)
