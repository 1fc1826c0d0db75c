"""Tests of FP8 linear layers, as far as a CPU allows.

The tests check which settings are accepted, which layers are chosen, how much memory is planned, which stored scores
and checkpoints are used, and how long rows are. Padding must change no number.

``tests/nullgpu/test_null_gpu_fp8.py`` runs the layers on an emulated GPU that computes nothing. No test computes
in FP8.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_engine.batching.micro_batches import padded_rows, stacked_batches, tree_batches
from dpo_engine.batching.packing import CostModel
from dpo_engine.batching.trees import needed_columns
from dpo_engine.checkpoint.identity import identity
from dpo_engine.checkpoint.resume import compare
from dpo_engine.config.parallel_section import TOKEN_MULTIPLES, MegatronConfig
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.model import spec as layer_specs
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.fp8 import fp8_layers, fp8_line, fp8_model_problems, spec_name, without_fp8
from dpo_engine.model.megatron_options import megatron_problems
from dpo_engine.model.memory import memory
from dpo_engine.model.spec import choose_layers
from dpo_engine.platform.device import Platform
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from dpo_engine.training import first_step
from dpo_engine.training.fill_store import open_store
from dpo_engine.verbs import parity
from dpo_engine.verbs.check import check
from support.family_cases import checkpoint
from support.layouts import LAYOUTS, SIZES, world

BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
TENSORWISE = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
SOME = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
START, END = "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"
FP8 = "megatron.transformer.fp8=e4m3: "


def config_of(options, **sections):
    raw = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}, **sections}
    raw["model"] = {"path": "m", **raw["model"]}
    return Config.parse({**raw, "megatron": {"transformer": options}})


DELAYED = (
    "delayed scaling is not supported: its scales come from earlier passes, would differ between policy and "
    "reference, and would not be in checkpoints; use tensorwise, blockwise or mxfp8"
)
NO_EFFECT = "has no effect unless megatron.transformer.fp8 is set"
REFUSALS = [
    (
        {"fp8": "e4m3"},
        {},
        f"fp8=e4m3: requires fp8_recipe, because Megatron's default is delayed scaling, and {DELAYED}",
    ),
    ({"fp8": "e4m3", "fp8_recipe": "delayed"}, {}, f"fp8_recipe=delayed: {DELAYED}"),
    (
        {"fp8": "e4m3", "fp8_recipe": "custom"},
        {},
        "fp8_recipe=custom: it runs code that the engine does not know; use tensorwise, blockwise or mxfp8",
    ),
    ({"fp8": "e5m2"}, {}, "fp8=e5m2: must be e4m3, hybrid or null; correct it"),
    (
        {"fp8": None},
        {},
        "fp8=null: has no effect unless the field is set to e4m3 or hybrid; meet this condition, or remove the field",
    ),
    ({"fp8_recipe": "blockwise"}, {}, f"fp8_recipe=blockwise: {NO_EFFECT}; meet this condition, or remove the field"),
    (
        {"first_last_layers_bf16": True},
        {},
        f"first_last_layers_bf16=true: {NO_EFFECT}; meet this condition, or remove the field",
    ),
    (
        {**BLOCKWISE, START: 2},
        {},
        f"{START}=2: {NO_EFFECT} and first_last_layers_bf16 is true; meet this condition, or remove the field",
    ),
    ({**BLOCKWISE, **SOME, END: -1}, {}, f"{END}=-1: must be at least 0; correct it"),
    (
        BLOCKWISE,
        {"model": {"spec": "native"}},
        "fp8=e4m3: requires Transformer Engine's layers, but model.spec is native; set model.spec=te, or remove this "
        "option",
    ),
    (
        BLOCKWISE,
        {"model": {"dtype": "fp32"}},
        "fp8=e4m3: requires weights in bf16, but model.dtype is fp32; set model.dtype=bf16, or remove this option",
    ),
    (
        BLOCKWISE,
        {"reference": {"mode": "dataset"}},
        "fp8=e4m3: the log-probabilities in the records were not computed with these FP8 settings, so policy and "
        "reference would differ before training; set reference.mode=resident, or remove fp8",
    ),
    (
        TENSORWISE,
        {"reference": {"mode": "stored"}},
        "fp8_recipe=tensorwise: its scales depend on the micro-batch, and stored log-probabilities were computed in "
        "other micro-batches; use blockwise or mxfp8, or set reference.mode=resident",
    ),
    (
        {**BLOCKWISE, "distribute_saved_activations": True},
        {"model": {"recompute": "full"}, "parallel": {"tp": 2, "sequence_parallel": False}},
        "distribute_saved_activations=true: has never been tested with fp8; remove the field",
    ),
    (
        {**BLOCKWISE, "fp8_param": True},
        {},
        "fp8_param=true: cannot be set, because weights are read and exported in the model's dtype, which is not fp8; "
        "remove the field",
    ),
    (
        {**BLOCKWISE, "fp8_amax_history_len": 16},
        {},
        "fp8_amax_history_len=16: cannot be set, because it is an option of delayed scaling, whose scales come from "
        "earlier passes and are not in checkpoints; remove the field",
    ),
    (
        {**BLOCKWISE, "fp8_dot_product_attention": True},
        {},
        "fp8_dot_product_attention=true: cannot be set, because attention stays in bf16; remove the field",
    ),
    (
        {"fp4": "e2m1"},
        {},
        "fp4=e2m1: cannot be set, because FP4 has never been tested with the engine; remove the field",
    ),
]


@pytest.mark.parametrize("options, sections, message", REFUSALS)
def test_refusals(options, sections, message):
    assert megatron_problems(config_of(options, **sections)) == [f"megatron.transformer.{message}"]


@pytest.mark.parametrize("mode", ["auto", "resident", "offloaded", "stored", "none"])
@pytest.mark.parametrize("options", [BLOCKWISE, {**BLOCKWISE, **SOME}, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}])
def test_what_can_be_set(options, mode):
    loss = {"name": "simpo"} if mode == "none" else {}
    accepted = config_of(options, reference={"mode": mode}, model={"spec": "te", "recompute": "selective"}, loss=loss)
    assert megatron_problems(accepted) == []
    assert Config.parse(accepted.model_dump(mode="json")).megatron.transformer == options
    assert without_fp8(accepted).megatron == MegatronConfig()


def test_a_checkpoint_of_another_precision_is_not_resumed(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))
    rest = {"reference": None, "train_data": {}, "tokenizer": "t", "total_steps": 3}
    plain, fp8 = (
        identity(config_of(options), arch, dtype="bfloat16", loss_options={}, **rest) for options in ({}, BLOCKWISE)
    )
    with pytest.raises(CheckpointError, match=r"fp8.*; restore .* set checkpoint.accept_changes=\[megatron\]"):
        compare(plain, fp8, where="here")


def test_scores_of_another_precision_are_stored_apart(tmp_path):
    def folder(options):
        config = config_of(options, reference={"mode": "stored", "store": str(tmp_path)})
        return open_store(
            SimpleNamespace(config=config, dtype_name="bfloat16", spec="te", reference_digest="abc")
        ).folder.name

    assert folder({}) == "abc-bfloat16-te"
    assert folder(BLOCKWISE) == "abc-bfloat16-te-e4m3-blockwise"
    assert folder({**BLOCKWISE, **SOME}) == "abc-bfloat16-te-e4m3-blockwise-1-0"
    assert spec_name(config_of({}), "native") == "native"


def test_layers_in_fp8(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))  # four layers
    assert list(fp8_layers(config_of({}), arch)) == []
    assert list(fp8_layers(config_of(BLOCKWISE), arch)) == [0, 1, 2, 3]
    assert list(fp8_layers(config_of({**BLOCKWISE, "first_last_layers_bf16": True}), arch)) == [1, 2]
    assert list(fp8_layers(config_of({**BLOCKWISE, **SOME}), arch)) == [1, 2, 3]
    assert fp8_line(config_of({}), arch) == ""
    assert fp8_line(config_of(TENSORWISE), arch) == ", linear layers in fp8 hybrid tensorwise"
    assert (
        fp8_line(config_of({**BLOCKWISE, **SOME}), arch)
        == ", linear layers of decoder layers 1 to 3 in fp8 e4m3 blockwise"
    )


def test_refusals_for_a_model(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))  # hidden size 64, head size 8, 4 key heads, MLP width 96

    def problems(options, **parallel):
        ranks = parallel.get("tp", 1) * parallel.get("pp", 1)
        return fp8_model_problems(config_of(options), arch, ParallelDims(**parallel, world=ranks))

    assert problems(BLOCKWISE) == problems({}) == problems({}, tp=4) == []
    (line,) = problems(BLOCKWISE, tp=4)
    assert line == (
        f"{FP8}the width of the MLP on each rank, 24, must be a multiple of 16; lower parallel.tp or parallel.etp, or "
        "remove fp8"
    )
    mxfp8 = problems({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, tp=2)
    assert [line.split(": ")[1].split(", must")[0] for line in mxfp8] == ["the width of the MLP on each rank, 48"]
    assert problems({**BLOCKWISE, **SOME, START: 3}, pp=2) == [
        f"megatron.transformer.{START}=3: must be at most 2, the number of layers of a pipeline stage; lower it"
    ]
    assert problems({**BLOCKWISE, "first_last_layers_bf16": True, START: 2, END: 2}) == [
        "megatron.transformer.first_last_layers_bf16=true: none of the 4 layers would compute in fp8; lower "
        f"{START} or {END}"
    ]


def test_refusals_for_other_layers(tiny_hf):
    arch = read_architecture(checkpoint(tiny_hf, "olmo2"))
    assert fp8_model_problems(config_of(BLOCKWISE), arch, ParallelDims())[0] == (
        f"{FP8}requires Transformer Engine's layers, which do not support olmo2 models; remove this option"
    )


@pytest.fixture
def transformer_engine(monkeypatch):
    """Pretend that Transformer Engine is installed, and that the GPU has compute capability 9.0.

    Returns the object that says which recipes are available. At first, all recipes are available.
    """
    known = SimpleNamespace(**{f"is_{name}_available": lambda: (True, "") for name in ("fp8", "mxfp8")})
    known.is_fp8_block_scaling_available = lambda: (True, "")
    module = ModuleType("transformer_engine.pytorch.fp8")
    module.FP8GlobalStateManager = known
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return known


def test_choosing_layers(tiny_hf, transformer_engine, monkeypatch):
    arch, gpu = read_architecture(tiny_hf("llama")), Platform(torch.device("cpu"), "nccl", gpu=True)

    def choose(options, platform=gpu, dtype=torch.bfloat16, dims=ParallelDims(), **sections):  # noqa: B008
        return choose_layers(config_of(options, **sections), arch, dims, platform, dtype)

    def refusal(*given, **named):
        with pytest.raises(ConfigError) as found:
            choose(*given, **named)
        (line,) = found.value.problems
        return line

    assert choose({}) == choose(BLOCKWISE) == choose(TENSORWISE) == "te"
    assert refusal(BLOCKWISE, Platform(torch.device("cpu"), "gloo", gpu=False)) == (
        f"{FP8}requires Transformer Engine's layers, but this machine has no GPU; remove fp8"
    )
    assert refusal(BLOCKWISE, dtype=torch.float32) == (
        f"{FP8}requires weights in bf16, but they are in torch.float32; remove fp8"
    )
    assert "a multiple of 16" in refusal(BLOCKWISE, dims=ParallelDims(tp=4, world=4))

    unusable = "megatron.transformer.fp8_recipe={}: cannot be used here: {}; use {}, or remove fp8"
    why = "Device compute capability 10.0 or higher required for MXFP8 execution"
    transformer_engine.is_mxfp8_available = lambda: (False, f"{why}.")
    assert refusal({"fp8": "e4m3", "fp8_recipe": "mxfp8"}) == unusable.format("mxfp8", why, "blockwise or tensorwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert refusal(BLOCKWISE) == unusable.format(
        "blockwise",
        "Transformer Engine would convert blockwise scales to mxfp8 scales in every matrix product",
        "mxfp8 or tensorwise",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    transformer_engine.is_fp8_block_scaling_available = lambda: (False, "CUDA >= 12.9 is required")
    assert refusal(BLOCKWISE) == unusable.format("blockwise", "CUDA >= 12.9 is required", "tensorwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    del transformer_engine.is_fp8_block_scaling_available
    assert refusal(BLOCKWISE) == unusable.format(
        "blockwise",
        "this version of Transformer Engine does not have this recipe",
        "a GPU and a version of Transformer Engine that support this recipe",
    )


def test_check_accepts_fp8_without_a_gpu(files, tiny_hf, tmp_path):
    from support.small_run import config_of as run_of

    given = {"model": {"spec": "te", "dtype": "bf16"}, "megatron": {"transformer": BLOCKWISE}}
    assert check(run_of(files, tiny_hf("llama"), tmp_path / "out", **given)) == []
    given["parallel"] = {"tp": 4}
    assert [line[: len(FP8)] for line in check(run_of(files, tiny_hf("llama"), tmp_path / "out", **given))] == [FP8]


def test_copies_of_weights_are_counted(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))
    layer = (8 + 2 * 4) * 8 * 64 + 64 * 64 + 3 * 64 * 96 + 2 * 64

    def found(options, dtype="bf16", **sections):
        return memory(config_of(options, **sections), arch, ParallelDims(), dtype=dtype, tokens=1024)

    plain, fp8 = found({}), found(BLOCKWISE)
    assert plain.fp8 == 0 and "fp8" not in plain.parts
    assert fp8.fp8 == 4 * layer * 3 == fp8.peak - plain.peak == fp8.constant - plain.constant
    assert found(BLOCKWISE, reference={"mode": "offloaded"}).fp8 == 4 * layer * 2
    assert found({**BLOCKWISE, **SOME}).fp8 == 3 * layer * 3
    assert found(BLOCKWISE, dtype="fp32").fp8 == 0


def test_the_first_step_names_rounding(tiny_hf, monkeypatch):
    monkeypatch.setattr(first_step, "known_equal", lambda engine: True)
    arch = SimpleNamespace(experts=None)
    facts = SimpleNamespace(facts=SimpleNamespace(at_init=0.5))

    def lines(options):
        config = config_of(options, reference={"mode": "stored"})
        engine = SimpleNamespace(config=config, arch=arch, objective=facts, dtype=torch.bfloat16)
        return first_step.first_step_problems(engine, {"loss": 0.6, "rewards/margins": 0.04})

    (plain,), (fp8,) = lines({}), lines(BLOCKWISE)
    assert plain.startswith("first loss=0.6000000: ") and fp8 == f"{plain}, {first_step.ROUNDING}"


def test_parity_leaves_fp8_out_and_says_so(tmp_path, monkeypatch):
    compared, said = [], []

    def measured(config, *rest, **named):
        compared.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(parity, "_measure_in_processes", measured)
    with pytest.raises(ConfigError, match="enough"):
        parity.parity(config_of({**BLOCKWISE, **SOME}), said.append)
    assert said == ["megatron.transformer.fp8: left out, because FP8 rounds differently in each layout"]
    assert compared[0].megatron == MegatronConfig()


SPLITS = [  # tp, cp, sequence parallelism
    (1, 1, False),
    (2, 1, True),
    (2, 1, False),
    (1, 2, False),
    (2, 2, True),
    (4, 3, True),
]


@pytest.mark.parametrize("tp, cp, split", SPLITS)
@pytest.mark.parametrize("recipe", TOKEN_MULTIPLES)
def test_token_counts_on_each_rank_fit_the_recipe(tp, cp, split, recipe):
    pairs, dims = RandomPairs(6, 500), ParallelDims(tp=tp, cp=cp, world=tp * cp)
    given = config_of(
        {"fp8": "e4m3", "fp8_recipe": recipe},
        train={"output_dir": "o", "micro_batch_size": 2},
        batch={"layout": "tree"},
    )
    wanted = TOKEN_MULTIPLES[recipe] * (tp if split else 1)
    rows = stacked_batches(pairs, np.arange(6), given, dims, 0, split)
    assert [batch.tokens.shape for batch in rows] == [
        tuple(shape) for shape in padded_rows(pairs, np.arange(6), given, dims, split).tolist()
    ]
    trees = tree_batches(pairs, np.arange(6), given, dims, 0, split, CostModel(token=100, visible=1, scored=50))
    assert rows and trees
    for batch in (*rows, *trees):
        for rank in range(cp):
            share = batch.shard(rank, cp)
            assert share.tokens.shape[1] % wanted == 0 and share.tokens.shape[1] > 0
            if batch.segments is not None:
                assert len(needed_columns(share, wanted)) % wanted == 0


def padded_training(config, multiple, **arguments):
    """Train with rows that are padded as for FP8. No layer computes in FP8, because a CPU cannot compute in FP8."""
    from dpo_engine.training.engine import Engine

    MegatronConfig.token_multiple = multiple
    built = Engine.host_batches

    def checked(engine, *given):
        wanted = multiple * (engine.groups.dims.tp if engine.sequence_parallel else 1)
        for batch in (batches := built(engine, *given)):
            assert batch.tokens.shape[1] % wanted == 0
            assert batch.columns is None or len(batch.columns) % wanted == 0
        return batches

    Engine.host_batches = checked
    return train_steps(config, **arguments)


PLAIN = {"distributed_optimizer": False}
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
DEFAULT = (("one", "stacked"), ("one", "tree"), ("tp2 cp2", "tree"))


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    config = run_config(tiny_hf("llama"), out, parallel=PLAIN)
    return run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(out), few=3, fp64=True)[0], out


@pytest.mark.parametrize(
    "name, rows",
    [
        pytest.param(name, rows, marks=() if (name, rows) in DEFAULT else pytest.mark.slow)
        for name in LAYOUTS
        for rows in ("stacked", "tree")
    ],
)
def test_padding_changes_no_number(name, rows, expected, tiny_hf, tmp_path):
    batch = TREE if rows == "tree" else {}
    config = run_config(tiny_hf("llama"), tmp_path, parallel=LAYOUTS[name] | PLAIN, batch=batch)
    given = {"config": config, "sizes": SIZES, "export": str(tmp_path), "few": 3, "fp64": True}
    for result in run_ranks(padded_training, world(name, LAYOUTS[name]), multiple=16, **given):
        assert_same_numbers(result, expected[0], 1e-10)
    assert_same_weights(tmp_path, expected[1], tiny_hf("llama"), 1e-10)
