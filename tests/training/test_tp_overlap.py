"""Tests of ``tp_comm_overlap`` on a CPU: wrong settings are refused, and rows of a fixed size do not change results.

With ``tp_comm_overlap``, the row of tokens of every micro-batch is padded to one size, that of the communication
buffers.

``tests/nullgpu/test_null_gpu_overlap.py`` runs Transformer Engine's layers on an emulated GPU that computes nothing.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dpo_engine.batching.micro_batches import fixed_row, share_batches, token_budget, tree_batches
from dpo_engine.batching.packing import CostModel
from dpo_engine.batching.trees import PADDING
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model import spec as layer_specs
from dpo_engine.model import tp_overlap
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.megatron_options import layout_problems, megatron_problems
from dpo_engine.model.memory import memory
from dpo_engine.model.spec import choose_layers, describe_layers
from dpo_engine.model.tp_overlap import close_buffers, layer_options, without_overlap
from dpo_engine.platform.device import Platform
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from dpo_engine.training import first_step
from dpo_engine.verbs import parity
from dpo_engine.verbs.check import check
from support.family_cases import checkpoint
from support.layouts import LAYOUTS, SIZES, world
from support.small_run import config_of as run_of

ON = {"tp_comm_overlap": True}
TP2, TREE = {"parallel": {"tp": 2}}, {"batch": {"layout": "tree"}}
TENSORWISE = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
MXFP8 = {"fp8": "e4m3", "fp8_recipe": "mxfp8"}
LINE = "megatron.transformer.tp_comm_overlap=true: "


def config_of(options, **sections):
    raw = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}, **TP2, **TREE, **sections}
    raw["model"] = {"path": "m", **raw["model"]}
    return Config.parse({**raw, "megatron": {"transformer": options}})


NO_EFFECT = (
    "has no effect unless its value is true, parallel.tp is above 1, and parallel.sequence_parallel is true or auto; "
    "meet this condition, or remove the field"
)
REFUSALS = [
    ({"tp_comm_overlap": False}, {}, f"tp_comm_overlap=false: {NO_EFFECT}"),
    ({"tp_comm_overlap": "yes"}, {}, "tp_comm_overlap=yes: must be true or false; correct it"),
    (ON, {"parallel": {}}, f"tp_comm_overlap=true: {NO_EFFECT}"),
    (ON, {"parallel": {"tp": 2, "sequence_parallel": False}}, f"tp_comm_overlap=true: {NO_EFFECT}"),
    (
        ON,
        {"parallel": {"tp": 3}},
        "tp_comm_overlap=true: Transformer Engine has kernels for parallel.tp=2, 4 or 8 only; change parallel.tp",
    ),
    (
        ON,
        {"model": {"spec": "native"}},
        "tp_comm_overlap=true: requires Transformer Engine's layers, but model.spec is native; set model.spec=te, or "
        "remove this option",
    ),
    (
        ON,
        {"model": {"dtype": "fp32"}},
        "tp_comm_overlap=true: requires weights in bf16, but model.dtype is fp32; set model.dtype=bf16, or remove this "
        "option",
    ),
    (
        ON,
        {"batch": {"layout": "auto"}},
        "tp_comm_overlap=true: requires rows of one size, which only the tree layout has, but batch.layout "
        "is auto; set batch.layout=tree, or remove tp_comm_overlap",
    ),
    (
        ON,
        {"optim": {"freeze": ["model.embed_tokens.weight"]}},
        "tp_comm_overlap=true: Transformer Engine with tp_comm_overlap does not sum the input gradient of a frozen "
        "layer over the ranks; remove tp_comm_overlap or optim.freeze",
    ),
    (
        {**ON, "fp8": "e4m3", "fp8_recipe": "blockwise"},
        {},
        "tp_comm_overlap=true: Transformer Engine cannot exchange numbers in the format of fp8_recipe=blockwise; use "
        "another recipe, or remove tp_comm_overlap",
    ),
    (
        {**ON, "tp_comm_overlap_rs_dgrad": True},
        {},
        "tp_comm_overlap_rs_dgrad=true: cannot be set, because tp_comm_overlap was tested only with Megatron's "
        "defaults of the other tp_comm_overlap fields; remove the field",
    ),
]


@pytest.mark.parametrize("options, sections, message", REFUSALS)
def test_refusals(options, sections, message):
    assert megatron_problems(config_of(options, **sections)) == [f"megatron.transformer.{message}"]


def test_what_can_be_set(tiny_hf):
    accepted = config_of(ON, model={"spec": "te", "recompute": "full"}, parallel={"tp": 4, "pp": 2, "vpp": 2, "cp": 2})
    assert megatron_problems(accepted) == []
    assert Config.parse(accepted.model_dump(mode="json")).megatron.tp_comm_overlap
    assert without_overlap(accepted).megatron.transformer == {}
    arch = read_architecture(tiny_hf("llama"))
    text = "layer spec te (Transformer Engine norms), bfloat16"
    assert describe_layers(config_of({}), arch, "te", "bfloat16") == text
    assert describe_layers(accepted, arch, "te", "bfloat16") == (
        f"{text}, tensor-parallel communication overlaps with matrix products"
    )


def test_refusals_for_a_model(tiny_hf):
    def problems(arch, options=ON):
        return layout_problems(config_of(options), arch, ParallelDims(tp=2, world=2), ranks=True)

    assert problems(read_architecture(tiny_hf("llama"))) == []
    assert problems(read_architecture(checkpoint(tiny_hf, "olmo2")), {}) == []
    assert problems(read_architecture(checkpoint(tiny_hf, "olmo2"))) == [
        f"{LINE}requires Transformer Engine's layers, which do not support olmo2 models; remove this option"
    ]
    assert problems(read_architecture(tiny_hf("llama", num_hidden_layers=1))) == [
        f"{LINE}has no effect on the last layer, which is this model's only layer; remove tp_comm_overlap"
    ]
    narrow = tiny_hf("llama", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    assert problems(read_architecture(narrow)) == [
        f"{LINE}the hidden size, 48, must be a multiple of 32; remove tp_comm_overlap"
    ]
    assert problems(read_architecture(tiny_hf("llama")), {**ON, **TENSORWISE}) == []
    assert [line for line in problems(read_architecture(tiny_hf("llama")), {**ON, **MXFP8}) if LINE in line] == [
        f"{LINE}the hidden size, 64, must be a multiple of 512; remove tp_comm_overlap",
        f"{LINE}the width of the attention output on each rank, 32, must be a multiple of 128; remove tp_comm_overlap",
        f"{LINE}the width of the MLP on each rank, 48, must be a multiple of 128; remove tp_comm_overlap",
    ]


def test_check_accepts_the_overlap_without_a_gpu(files, tiny_hf, tmp_path):
    given = {"model": {"spec": "te"}, "megatron": {"transformer": ON}, **TP2}
    assert check(run_of(files, tiny_hf("llama"), tmp_path / "out", **given, **TREE)) == []
    (problem,) = check(run_of(files, tiny_hf("llama"), tmp_path / "out", **given, batch={"layout": "stacked"}))
    assert problem.startswith(f"{LINE}requires rows of one size")


@pytest.fixture
def transformer_engine(monkeypatch):
    """Pretend that Transformer Engine is installed.

    Record each creation of its buffers, with the arguments, and each destruction.
    """
    made = SimpleNamespace(calls=[], multicast=True)
    compiled, base = ModuleType("transformer_engine_torch"), ModuleType("transformer_engine.pytorch.module.base")
    compiled.device_supports_multicast = lambda: made.multicast
    base.initialize_ub = lambda *given, **named: made.calls.append((given, named))
    base.destroy_ub = lambda: made.calls.append("destroyed")
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (compiled, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: True)
    monkeypatch.delenv("UB_SKIPMC", raising=False)
    made.base = base
    yield made
    tp_overlap._opened = None


def test_choosing_layers(tiny_hf, transformer_engine, monkeypatch):
    arch, gpu = read_architecture(tiny_hf("llama")), Platform(torch.device("cpu"), "nccl", gpu=True)

    def choose(platform=gpu, dtype=torch.bfloat16):
        return choose_layers(config_of(ON), arch, ParallelDims(tp=2, world=2), platform, dtype)

    def refusal(*given):
        with pytest.raises(ConfigError) as found:
            choose(*given)
        (line,) = found.value.problems
        return line

    assert choose() == "te"
    assert refusal(Platform(torch.device("cpu"), "gloo", gpu=False)) == (
        f"{LINE}requires Transformer Engine's layers, but this machine has no GPU; remove tp_comm_overlap"
    )
    assert refusal(gpu, torch.float32) == (
        f"{LINE}requires weights in bf16, but they are in torch.float32; remove tp_comm_overlap"
    )
    transformer_engine.multicast = False
    assert refusal() == (
        f"{LINE}this GPU, its driver or this version of CUDA cannot write to several GPUs at once (multicast); set the "
        "environment variable UB_SKIPMC=1, to write to each GPU separately, or remove tp_comm_overlap"
    )
    monkeypatch.setenv("UB_SKIPMC", "1")
    assert choose() == "te"


def at_end(count):
    return {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": count,
    }


def test_buffers_are_created_once(tiny_hf, transformer_engine, monkeypatch):
    arch, dims = read_architecture(tiny_hf("llama")), ParallelDims(tp=2, cp=2, world=4)
    monkeypatch.setattr(dist, "all_gather_object", lambda out, value, group: out.__setitem__(slice(None), hosts))
    monkeypatch.setattr(dist, "new_group", lambda *given, **named: None)
    group, hosts = SimpleNamespace(size=lambda: 4), ["a", "a", "b", "b"]

    def options(row_tokens, given=ON):
        return layer_options(config_of(given), arch, dims, group, row_tokens)

    assert options(None, {}) == options(64, {}) == options(None) == {}
    assert transformer_engine.calls == []
    assert options(64) == options(64) == ON
    ours = {"dtype": torch.bfloat16, "bootstrap_backend": "nccl"}
    assert transformer_engine.calls == [(([32, 64], 2), {**ours, "use_fp8": False})]
    transformer_engine.base.UserBufferQuantizationMode = SimpleNamespace(NONE="none", FP8="fp8")  # in newer versions
    assert options(128) == ON
    assert transformer_engine.calls[1:] == ["destroyed", (([64, 64], 2), {**ours, "quantization_modes": ["none"]})]
    close_buffers()
    close_buffers()
    assert transformer_engine.calls[3:] == ["destroyed"]

    # The last layer has no overlap. In the first two cases, all other layers are in FP8. In the third case, all other
    # layers except one are in FP8.
    for mixed, modes in (({}, ["fp8"]), (at_end(1), ["fp8"]), (at_end(2), ["fp8", "none"])):
        options(128, {**ON, **TENSORWISE, **mixed})
        assert transformer_engine.calls[-1] == (([64, 64], 2), {**ours, "quantization_modes": modes})
        close_buffers()
    del transformer_engine.base.UserBufferQuantizationMode
    options(128, {**ON, **TENSORWISE})
    assert transformer_engine.calls[-1] == (([64, 64], 2), {**ours, "use_fp8": True})
    with pytest.raises(ConfigError) as found:
        options(128, {**ON, **TENSORWISE, **at_end(2)})
    assert found.value.problems == [
        f"{LINE}this version of Transformer Engine has one set of buffers, but some layers are in fp8 and some in "
        "bf16; remove tp_comm_overlap or first_last_layers_bf16"
    ]

    count = len(transformer_engine.calls)
    hosts = ["a", "b", "b", "b"]
    with pytest.raises(ConfigError) as found:
        options(64)
    assert found.value.problems == [
        f"{LINE}the 2 ranks of a tensor-parallel group must be on one node, but ranks 0 to 1 are on a and b; lower "
        "parallel.tp, or remove tp_comm_overlap"
    ]
    assert len(transformer_engine.calls) == count


def test_buffers_are_counted(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))  # hidden size 64

    def found(options, dtype="bf16", **sections):
        dims = ParallelDims(tp=2, cp=2, world=4)
        return memory(config_of(options, **sections), arch, dims, dtype=dtype, tokens=1024)

    plain, overlapped = found({}), found(ON)
    size = 12 * 512 * 64 * 2 + 3 * (32 << 20)
    assert plain.buffers == 0 and "buffers" not in plain.parts and overlapped.parts["buffers"] == size
    assert overlapped.buffers == size == overlapped.peak - plain.peak == overlapped.constant - plain.constant
    assert found(ON, adapter={"rank": 4}).buffers == size
    values, workspaces = 512 * 64, 3 * (32 << 20)
    assert found({**ON, **TENSORWISE}).buffers == values * (8 + 4 * 2) + workspaces
    assert found({**ON, **TENSORWISE, **at_end(2)}).buffers == values * (8 + 4 * 2 + 12 * 2) + workspaces
    assert found(ON, dtype="fp32").buffers == 0


def test_the_first_step_names_the_overlap(monkeypatch):
    monkeypatch.setattr(first_step, "known_equal", lambda engine: True)
    objective = SimpleNamespace(facts=SimpleNamespace(at_init=0.5))

    def lines(options, loss):
        engine = SimpleNamespace(config=config_of(options), objective=objective, dtype=torch.bfloat16)
        return first_step.first_step_problems(engine, {"loss": loss, "rewards/margins": 0.0})

    assert len(lines({}, 0.52)) == 1 and lines(ON, 0.52) == []
    assert lines(ON, 0.6) == [f"{lines({}, 0.6)[0]}, {first_step.PIECES}"]


def test_parity_in_fp64_leaves_the_overlap_out_and_says_so(monkeypatch):
    compared, said = [], []

    def measured(config, *rest, **named):
        compared.append(config.megatron.transformer)
        raise ConfigError("enough")

    monkeypatch.setattr(parity, "_measure_in_processes", measured)
    for fp64 in (True, False):
        with pytest.raises(ConfigError, match="enough"):
            parity.parity(config_of(ON), said.append, fp64=fp64)
    assert said == [f"{LINE[:-7]}: left out, because Transformer Engine does not support fp64"]
    assert compared == [{}, ON]


@pytest.mark.parametrize(
    "model, said_of",
    [
        ({"attention": "te"}, "model.attention"),
        ({"flash_attention": 3}, "model.flash_attention"),
        ({"attention": "te", "flash_attention": 3}, "model.attention and model.flash_attention"),
    ],
)
def test_parity_in_fp64_leaves_other_kernels_out_and_says_so(model, said_of, monkeypatch):
    compared, said = [], []

    def measured(config, *rest, **named):
        compared.append((config.model.attention, config.model.flash_attention))
        raise ConfigError("enough")

    monkeypatch.setattr(parity, "_measure_in_processes", measured)
    config = config_of({})
    asked = config.model_copy(update={"model": config.model.model_copy(update=model)})
    for fp64 in (True, False):
        with pytest.raises(ConfigError, match="enough"):
            parity.parity(asked, said.append, fp64=fp64)
    assert said == [f"{said_of}: left out, because the selected kernels do not support fp64"]
    assert compared == [("auto", 2), (asked.model.attention, asked.model.flash_attention)]


LAYERS = [(1, 1), (2, 1), (2, 2), (4, 3)]
COST = CostModel(token=100, visible=1, scored=50)


@pytest.mark.parametrize("tp, cp", LAYERS)
def test_all_rows_have_the_same_size(tp, cp):
    train, held_out = RandomPairs(24, 500), RandomPairs(5, 500, seed=9, sizes=[(70, 20, 31)] * 5)
    dims = ParallelDims(tp=tp, cp=cp, world=tp * cp * 2)
    config = config_of(ON, batch={"layout": "tree", "tokens_per_micro_batch": 97}, parallel={"tp": tp, "cp": cp})
    size = fixed_row(config, dims, tp > 1, train, [held_out])
    assert 121 <= size < 121 + tp * cp * 2 and size % (tp * cp) == 0
    assert 97 <= fixed_row(config, dims, tp > 1, train, [train]) < 121
    in_blocks = config_of({**ON, **MXFP8}, batch=config.batch.model_dump(), parallel={"tp": tp, "cp": cp})
    if tp > 1:
        assert fixed_row(in_blocks, dims, True, train, [held_out]) == 128 * tp * cp
    for pairs, count in ((train, 24), (held_out, 5)):
        made = [
            share_batches(pairs, np.arange(count), config, dims, dp, rank, tp > 1, COST, size)
            for dp in range(2)
            for rank in range(cp)
        ]
        shapes = {tuple(batch.tokens.shape) for batches in made for batch in batches}
        assert shapes == {(1, size // cp)} and len({len(batches) for batches in made}) == 1


def test_the_budget_of_the_longest_pairs():
    config = config_of(ON, train={"output_dir": "o", "micro_batch_size": 3})
    pairs = RandomPairs(24, 500)
    assert token_budget(pairs, config) <= fixed_row(config, ParallelDims(tp=2, world=2), True, pairs, [])


def test_padding_consists_of_short_segments():
    pairs, dims = RandomPairs(2, 500), ParallelDims()
    given = pairs, np.arange(2), config_of({}, train={"output_dir": "o", "micro_batch_size": 2}), dims, 0, False, COST
    (plain,), (padded,) = tree_batches(*given), tree_batches(*given, 700)
    count = plain.segments.shape[1]
    missing = 700 - int(plain.segments[0].sum())
    assert padded.segments[:, :count].equal(plain.segments)
    assert padded.segments[0, count:].tolist() == [PADDING, PADDING, missing - 2 * PADDING]
    assert padded.segments[1, count:].tolist() == [-1, -1, -1] and padded.positions.max() == PADDING - 1
    assert padded.scored.sites.equal(plain.scored.sites)


def test_rows_that_do_not_fit():
    config = config_of({}, batch={"layout": "tree", "tokens_per_micro_batch": 64})
    pairs = RandomPairs(1, 500, sizes=[(60, 20, 20)])
    with pytest.raises(RuntimeError) as found:
        tree_batches(pairs, np.arange(1), config, ParallelDims(), 0, False, COST, 64)
    assert str(found.value) == (
        "a row of trees has 100 tokens, but rows have a fixed size of 64; call Engine.settle_batches with all pairs "
        "that the run scores"
    )


def settled(config):
    """Return the log line about rows, the shapes of training and validation micro-batches, and the row size."""
    from dpo_engine.training import engine as engine_module

    engine_module.choose_layers = lambda *given: "native"
    engine = engine_module.Engine.open(config)
    train, held_out = RandomPairs(12, 500), RandomPairs(3, 500, seed=9, sizes=[(80, 20, 40)] * 3)
    train.digest = "0"  # settle_batches needs a digest; `RandomPairs` has none, because it has no file
    lines = engine.settle_batches(train, [train, held_out])
    batches = [*engine.host_batches(train, np.arange(12)), *engine.host_batches(held_out, np.arange(3))]
    engine.close()
    return lines[-1], {tuple(batch.tokens.shape) for batch in batches}, engine.row_tokens


def test_settled_rows(tiny_hf, tmp_path):
    given = {"megatron": {"transformer": ON}, "parallel": {"tp": 2}, "batch": {"layout": "tree"}}
    for found in run_ranks(settled, 2, config=run_config(tiny_hf("llama"), tmp_path, **given)):
        assert found == ("rows: all padded to 140 tokens, the size of tp_comm_overlap's buffers", {(1, 140)}, 140)


def layers_with_the_overlap(config):
    """Return, for each layer of the model, the values of ``tp_comm_overlap`` with which its modules are built."""
    from dpo_engine.training import engine as engine_module

    engine_module.layer_options = lambda *given: ON
    engine = engine_module.Engine.open(config)
    (chunk,) = engine.load_model(config.model.path)
    engine.close()
    return [
        {module.config.tp_comm_overlap for module in layer.modules() if hasattr(module, "config")}
        for layer in chunk.decoder.layers
    ]


def test_the_last_layer_is_built_without_the_overlap(tiny_hf, tmp_path):
    config = run_config(tiny_hf("llama"), tmp_path, parallel={"tp": 2}, batch={"layout": "tree"})
    for found in run_ranks(layers_with_the_overlap, 2, config=config):
        assert found == [{True}, {True}, {True}, {False}]


ROW = 400


def padded_training(config, **arguments):
    """Train with rows of a fixed size, on a CPU."""
    from dpo_engine.batching.blocks import padded_length
    from dpo_engine.training.engine import Engine

    opened, built = Engine.open, Engine.host_batches

    def with_fixed_rows(*given, **named):
        engine = opened(*given, **named)
        dims = engine.groups.dims
        engine.row_tokens = padded_length(ROW, dims.cp, dims.share_multiple(engine.sequence_parallel))
        return engine

    def checked(engine, *given):
        batches = built(engine, *given)
        assert {batch.tokens.shape[1] * engine.groups.dims.cp for batch in batches} == {engine.row_tokens}
        return batches

    Engine.open, Engine.host_batches = with_fixed_rows, checked
    return train_steps(config, **arguments)


PLAIN = {"distributed_optimizer": False}
DEFAULT = ("one", "pp2 vpp2", "tp2 cp2")


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    config = run_config(tiny_hf("llama"), out, parallel=PLAIN)
    return run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(out), few=3, fp64=True)[0], out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]
)
def test_rows_of_a_fixed_size_change_no_number(name, expected, tiny_hf, tmp_path):
    batch = {"layout": "tree", "tokens_per_micro_batch": 80}
    config = run_config(tiny_hf("llama"), tmp_path, parallel=LAYOUTS[name] | PLAIN, batch=batch)
    given = {"config": config, "sizes": SIZES, "export": str(tmp_path), "few": 3, "fp64": True}
    for result in run_ranks(padded_training, world(name, LAYOUTS[name]), **given):
        assert_same_numbers(result, expected[0], 1e-10)
    assert_same_weights(tmp_path, expected[1], tiny_hf("llama"), 1e-10)
