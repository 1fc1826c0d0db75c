"""Tests of the section ``megatron``: accepted options work and do not change results, and other options are refused."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest

from dpo_engine.checkpoint.identity import identity
from dpo_engine.checkpoint.resume import compare
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.model import megatron_options
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.megatron_options import REFUSED, instance_problems, megatron_problems, optimizer_instances
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from dpo_engine.verbs.rehearse import CLOCK
from support.layouts import SIZES, world
from support.small_run import config_of as config_of_run
from support.small_run import log_of, run

FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective", "attention": "eager"}
WIDE = {"tp": 2, "sequence_parallel": False}
INTERLEAVED = {"pp": 2, "vpp": 2}
CASES = {
    "some layers": ({}, FULL, {"recompute_method": "block", "recompute_num_layers": 1}, {}),
    "tp2 groups of layers": ({"tp": 2}, FULL, {"recompute_method": "uniform", "recompute_num_layers": 2}, {}),
    "cp2 attention": ({"cp": 2}, SELECTIVE, {"recompute_modules": ["core_attn"]}, {}),
    "tp2 attention and mlp": ({"tp": 2}, SELECTIVE, {"recompute_modules": ["core_attn", "mlp"]}, {}),
    "tp2 distributed activations": (WIDE, FULL, {"distribute_saved_activations": True}, {}),
    "pp2 vpp2 larger groups": (INTERLEAVED, {}, {"microbatch_group_size_per_vp_stage": 4}, {}),
    "dp2 small buckets": ({"overlap": True}, {}, {}, {"bucket_size": 1000}),
    "pp2 vpp2 dp2 aligned": ({**INTERLEAVED, "overlap": True}, {}, {}, {"align_param_gather": True}),
    "cp2 dp2 two instances": ({"cp": 2}, {}, {}, {"num_distributed_optimizer_instances": 2}),
    "cp2 dp2 two overlapped instances": (
        {"cp": 2, "overlap": True},
        {},
        {},
        {"num_distributed_optimizer_instances": 2, "bucket_size": 20_000},
    ),
    "dp2 padded buckets": ({}, {}, {}, {"pad_buckets_for_high_nccl_busbw": True}),
    "dp2 sums in fp32": ({}, {}, {}, {"reduce_scatter_with_fp32_accumulation": True}),
}
SUMS = "reduce_scatter_with_fp32_accumulation"
DEFAULT = ("some layers", "cp2 attention", "pp2 vpp2 larger groups")


class Observed(NamedTuple):
    """The results of a rank, and what the rank did while it trained.

    calls        number of calls of modules and functions
    chunks       index of the model chunk of each forward pass, in order
    gathers      events in order: a trained chunk's index at each of its forward passes, and ``gather`` whenever an
                 all-gather of weights starts
    kept         bytes of the hidden states that each activation checkpoint keeps
    buckets      three counts: gradient buckets, values in the buckets, and values that this rank's optimizer updates
    """

    result: dict
    calls: Counter
    chunks: list
    gathers: list
    kept: list
    buckets: tuple


def observed(config, **arguments):
    """Train, and watch the modules and Megatron's functions. Return an :class:`Observed`."""
    from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
    from megatron.core.tensor_parallel.random import CheckpointFunction

    from dpo_engine.model.attention import CoreAttention
    from dpo_engine.model.layer import Layer
    from dpo_engine.model.policy import Policy
    from dpo_engine.optim.state import owned_slices
    from dpo_engine.training.engine import Engine

    calls, chunks, gathers, kept, buckets = Counter(), [], [], [], []

    def watch(owner, name, event, before=True):
        """Replace a method or function with a wrapper that also calls ``event`` with the same positional arguments.

        before  True: ``event`` is called before the method or function; False: after it
        """
        real = getattr(owner, name)

        def watched(*inputs, **more):
            if before:
                event(*inputs)
            found = real(*inputs, **more)
            if not before:
                event(*inputs)
            return found

        setattr(owner, name, staticmethod(watched) if owner is CheckpointFunction else watched)

    for kind, name in ((CoreAttention, "forward"), (Layer, "forward"), (Layer, "_mlp"), (Policy, "forward")):
        watch(kind, name, lambda *inputs, key=f"{kind.__name__}.{name}": calls.update([key]))
    watch(Policy, "forward", lambda chunk, *inputs: chunks.append(chunk.vp_stage))
    watch(DistributedDataParallel, "forward", lambda chunk, *inputs: gathers.append(chunk.module.vp_stage))
    group = param_and_grad_buffer._ParamAndGradBucketGroup
    watch(group, "start_param_sync", lambda *inputs: gathers.append("gather"))
    watch(param_and_grad_buffer, SUMS, lambda *inputs: calls.update([SUMS]))

    def count_kept(ctx, function, distributed, hidden, *others):
        if hidden.requires_grad:
            kept.append(hidden.untyped_storage().nbytes())

    watch(CheckpointFunction, "forward", count_kept, before=False)
    load = Engine.load_policy

    def loaded(self, **options):
        trained = load(self, **options)
        found = [bucket for chunk in trained.chunks for group in chunk.bucket_groups for bucket in group.buckets]
        owned = sum(one.stop - one.start for one in owned_slices(trained))
        buckets.append((len(found), sum(bucket.grad_data.numel() for bucket in found), owned))
        return trained

    Engine.load_policy = loaded
    return Observed(train_steps(config, **arguments), calls, chunks, gathers, kept, buckets[0])


@pytest.fixture(scope="module")
def expected(tiny_hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    config = run_config(tiny_hf("llama"), out, logging={"num_zeros": True})
    return run_ranks(train_steps, 1, config=config, sizes=SIZES, export=str(out / "hf"))[0], out / "hf"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in CASES]
)
def test_options_act_and_do_not_change_what_is_trained(name, expected, tiny_hf, tmp_path):
    layout, model, transformer, ddp = CASES[name]
    sections = {"parallel": layout, "logging": {"num_zeros": True}, "model": {"path": str(tiny_hf("llama")), **model}}
    # The option reduce_scatter_with_fp32_accumulation requires optim.gradients=bf16. The gradients of an fp32 model are
    # in fp32 even with this setting, so the results stay comparable.
    if "reduce_scatter_with_fp32_accumulation" in ddp:
        sections["optim"] = {"gradients": "bf16"}
    megatron = {"transformer": transformer, "ddp": ddp}
    ranks, out = world(name, layout), str(tmp_path / "hf")
    config = run_config(tiny_hf("llama"), tmp_path, **sections, megatron=megatron)
    assert megatron_problems(config) == []
    with_options = run_ranks(observed, ranks, config=config, sizes=SIZES, export=out)
    for one in with_options:
        assert_same_numbers(one.result, expected[0], 1e-5)
    assert_same_weights(out, expected[1], tiny_hf("llama"), 1e-5)
    plain = run_ranks(observed, ranks, config=run_config(tiny_hf("llama"), tmp_path, **sections), sizes=SIZES)
    for one, usual in zip(with_options, plain, strict=True):
        assert ACTS[name](one, usual), (one.calls, usual.calls, one.gathers, one.kept, usual.kept, one.buckets)


def some_layers(one, usual):
    """For each training micro-batch, the backward pass recomputes one of the four layers instead of all four."""
    again = (usual.calls["Layer.forward"] - 4 * usual.calls["Policy.forward"]) // 4
    return again > 0 and one.calls["Layer.forward"] == 4 * usual.calls["Policy.forward"] + again


def only_attention(one, usual):
    more = one.calls["CoreAttention.forward"] > usual.calls["CoreAttention.forward"]
    return more and one.calls["Layer._mlp"] < usual.calls["Layer._mlp"]


def attention_too(one, usual):
    more = one.calls["CoreAttention.forward"] > usual.calls["CoreAttention.forward"]
    return more and one.calls["Layer._mlp"] == usual.calls["Layer._mlp"]


def other_order(one, usual):
    return sorted(one.chunks) == sorted(usual.chunks) and one.chunks != usual.chunks


def aligned(one, usual):
    """In each step, the gathers of both chunks start before the first forward pass.

    Without the option, each gather starts only after the forward pass of its chunk has begun.
    """
    starts = [[*pairwise(found)] for found in (one.gathers, usual.gathers)]
    both = [pairs.count(("gather", "gather")) for pairs in starts]
    return both == [len(SIZES), 0] and one.gathers[:3] == ["gather", "gather", 0] and usual.gathers[0] == 0


ACTS = {
    "some layers": some_layers,
    "tp2 groups of layers": lambda one, usual: len(usual.kept) == 2 * len(one.kept) > 0,
    "cp2 attention": only_attention,
    "tp2 attention and mlp": attention_too,
    "tp2 distributed activations": lambda one, usual: one.kept and [2 * size for size in one.kept] == usual.kept,
    "pp2 vpp2 larger groups": other_order,
    "dp2 small buckets": lambda one, usual: one.buckets[0] > usual.buckets[0],
    "pp2 vpp2 dp2 aligned": aligned,
    "cp2 dp2 two instances": lambda one, usual: one.buckets[2] > 1.5 * usual.buckets[2],
    "cp2 dp2 two overlapped instances": lambda one, usual: one.buckets[2] > 1.5 * usual.buckets[2],
    "dp2 padded buckets": lambda one, usual: one.buckets[1] > usual.buckets[1] and one.buckets[1] % 2**16 == 0,
    "dp2 sums in fp32": lambda one, usual: one.calls[SUMS] > usual.calls[SUMS] == 0,
}
"""For each case, a function that returns whether the options had their effect on a rank.

The function's arguments are the rank's :class:`Observed` with the options and without the options.
"""


def config_of(parallel=None, recompute="none", **megatron):
    raw = {"model": {"path": "m", "recompute": recompute}, "data": {"train": "a"}, "train": {"output_dir": "o"}}
    return Config.parse({**raw, "parallel": parallel or {}, "megatron": megatron})


NOT_SET = "cannot be set, because "
REFUSALS = [
    (
        {"transformer": {"num_layers": 3}},
        f"num_layers=3: {NOT_SET}the model's config.json determines it; remove the field",
    ),
    (
        {"transformer": {"sequence_parallel": True}},
        "sequence_parallel=true: the engine has its own key; use parallel.sequence_parallel",
    ),
    ({"transformer": {"fp8_param": True}}, f"fp8_param=true: {NOT_SET}weights are read and exported in the model's"),
    (
        {"transformer": {"recompute_methods": "block"}},
        "recompute_methods=block: no such field of TransformerConfig in megatron-core",
    ),
    ({"transformer": {"nothing": 1}}, "nothing=1: no such field of TransformerConfig in megatron-core"),
    (
        {"transformer": {"use_te_rng_tracker": True}},
        f"use_te_rng_tracker=true: {NOT_SET}it has never been tested with the engine; remove the field",
    ),
    (
        {"transformer": {"recompute_method": "some"}},
        "recompute_method=some: must be uniform, block or null; correct it",
    ),
    (
        {"transformer": {"distribute_saved_activations": 1}},
        "distribute_saved_activations=1: must be true or false",
    ),
    ({"ddp": {"bucket_size": "x"}}, "bucket_size=x: must be a whole number or null; correct it"),
    (
        {"ddp": {"check_for_nan_in_grad": True}},
        f"check_for_nan_in_grad=true: {NOT_SET}the engine checks gradients; use bad_steps",
    ),
    (
        {"optimizer": {"optimizer_cpu_offload": True}},
        "optimizer_cpu_offload=true: the engine has its own key; use optim.states",
    ),
    (
        {"optimizer": {"exp_avg_dtype": "bf16"}},
        f"exp_avg_dtype=bf16: {NOT_SET}it requires Transformer Engine's FusedAdam, and checkpoints cannot "
        "contain FusedAdam's states; use optim.states=host",
    ),
    (
        {"transformer": {"recompute_modules": ["mlp"]}},
        "recompute_modules=[mlp]: has no effect unless model.recompute is selective; meet this condition, or "
        "remove the field",
    ),
    (
        {"recompute": "selective", "transformer": {"recompute_modules": ["moe"]}},
        "recompute_modules=[moe]: must contain core_attn or mlp, or both; the engine's layer cannot recompute other",
    ),
    (
        {"recompute": "selective", "transformer": {"recompute_modules": "mlp"}},
        "recompute_modules=mlp: must be a list of names or null; correct it",
    ),
    (
        {"recompute": "full", "transformer": {"recompute_num_layers": 0}},
        "recompute_num_layers=0: must be at least 1; correct it",
    ),
    (
        {"parallel": {"pp": 2, "vpp": 2}, "transformer": {"microbatch_group_size_per_vp_stage": 3}},
        "microbatch_group_size_per_vp_stage=3: must be a multiple of parallel.pp=2; correct it",
    ),
    (
        {"ddp": {"reduce_scatter_with_fp32_accumulation": True}},
        "reduce_scatter_with_fp32_accumulation=true: has no effect unless parallel.distributed_optimizer is true and "
        "optim.gradients is bf16; meet this condition, or remove the field",
    ),
    (
        {
            "parallel": {"pp": 2, "vpp": 2, "overlap": True, "distributed_optimizer": False},
            "ddp": {"align_param_gather": True},
        },
        "align_param_gather=true: has no effect unless parallel.overlap and parallel.distributed_optimizer are true "
        "and parallel.vpp is set; meet this condition, or remove the field",
    ),
    (
        {"parallel": {"distributed_optimizer": False}, "ddp": {"num_distributed_optimizer_instances": 2}},
        "num_distributed_optimizer_instances=2: has no effect unless parallel.distributed_optimizer is true; meet",
    ),
    (
        {"ddp": {"num_distributed_optimizer_instances": 0}},
        "num_distributed_optimizer_instances=0: must be at least 1; correct it",
    ),
    (
        {"ddp": {"bucket_size": 10}},
        "bucket_size=10: has no effect unless parallel.overlap is true; meet this condition, or remove the field",
    ),
]


@pytest.mark.parametrize("sections, message", REFUSALS)
def test_refusals(sections, message):
    (problem,) = megatron_problems(config_of(**sections))
    (part,) = {"transformer", "ddp", "optimizer"} & sections.keys()
    assert problem.startswith(f"megatron.{part}.{message}")


def test_refusals_of_several_instances(monkeypatch):
    ddp = {"num_distributed_optimizer_instances": 2}
    given = config_of(ddp={**ddp, "reduce_scatter_with_fp32_accumulation": True})
    given = given.model_copy(update={"optim": given.optim.model_copy(update={"gradients": "bf16"})})
    assert megatron_problems(given) == [
        "megatron.ddp.num_distributed_optimizer_instances=2: Megatron sums bf16 gradients in fp32 only if there "
        "is one instance; remove this field, or ddp.reduce_scatter_with_fp32_accumulation"
    ]
    monkeypatch.setattr(megatron_options, "find_spec", lambda name: None)
    assert megatron_problems(config_of(ddp=ddp)) == [
        "megatron.ddp.num_distributed_optimizer_instances=2: Megatron needs the package einops for this field; "
        "run pip install einops"
    ]
    expected = "megatron.ddp.num_distributed_optimizer_instances=2: must divide dp x cp, which is 3; use 1 or 3"
    with pytest.raises(ConfigError, match=expected):
        optimizer_instances(config_of(ddp=ddp), ParallelDims(world=3))
    dims = ParallelDims(ep=2, world=2)
    assert instance_problems(config_of(ddp=ddp), dims) == [
        "megatron.ddp.num_distributed_optimizer_instances=2: must divide dp x cp, which is 2, and must divide the "
        "number of copies of each expert, which is 1; use 1"
    ]


INSTANCES = {"num_distributed_optimizer_instances": 2}


@pytest.mark.slow
def test_a_run_with_instances_resumes_bitwise_and_matches_another_layout(files, tiny_hf, tmp_path):
    """Resume a run that has two instances of the distributed optimizer, and compare it with two other runs.

    The resumed run keeps its layout. Its metrics must be bitwise equal to those of an uninterrupted run with two
    instances. A run with one instance must give the same metrics up to rounding, both before and after it is resumed on
    fewer ranks.
    """
    model = tiny_hf("qwen3_moe", head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)

    def train(name, steps, ranks=4, ep=2, ddp=INSTANCES):
        sections = {"parallel": {"ep": ep}, "megatron": {"ddp": ddp}, "logging": {"num_zeros": True}}
        checkpoint = {"save_interval": 3, "export": False, "accept_changes": ["megatron"]}
        more = {"optim": {"schedule": "constant"}, "train": {"max_steps": steps}, "checkpoint": checkpoint}
        results = run_ranks(run, ranks, config=config_of_run(files, model, tmp_path / name, **sections, **more))
        assert isinstance(results[0], dict), results[0]
        lines = [line for line in log_of(tmp_path / name) if "loss" in line]
        return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]

    def size(name):
        (folder,) = (tmp_path / name / "checkpoints").glob("*3")
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    whole, plain = train("whole", 5), train("plain", 3, ddp={})
    for steps in (3, 5):
        parts = train("parts", steps)
    assert parts == whole and len(whole) >= 5
    for one, other in zip(whole[:3], plain[:3], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert size("whole") == pytest.approx(size("plain"), rel=0.01)  # only one instance writes its states
    for one, other in zip(train("plain", 5, ranks=2, ddp={})[3:], whole[3:], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_reasons_are_about_fields_that_exist():
    """A part of REFUSED must not list a field twice, and must not list a field that is accepted.

    Each part may list at most two fields that the installed version of Megatron does not have. Such fields exist in
    another supported version.
    """
    from dataclasses import fields
    from fnmatch import fnmatch

    from dpo_engine.model.megatron_options import ACCEPTED, dataclass_of

    for part, reasons in REFUSED.items():
        names = [field.name for field in fields(dataclass_of(part))]
        known = [one for listed in reasons.values() for one in listed]
        assert len(known) == len(set(known))
        assert not [one for one in ACCEPTED[part] for pattern in known if fnmatch(one, pattern)]
        assert len([one for one in known if not any(fnmatch(name, one) for name in names)]) <= 2


def test_changed_options_are_named_when_a_run_resumes(tiny_hf):
    arch = read_architecture(tiny_hf("llama"))

    def of(config):
        rest = {"reference": None, "train_data": {}, "tokenizer": "t", "total_steps": 3}
        return identity(config, arch, dtype="float32", loss_options={}, **rest)

    plain, changed = of(config_of()), of(config_of(recompute="full", transformer={"recompute_num_layers": 2}))
    with pytest.raises(CheckpointError, match=r"megatron.transformer.* checkpoint.accept_changes=\[megatron\]"):
        compare(plain, changed, where="here")
    assert compare(plain, changed, ["megatron"], where="here")
    earlier = {key: value for key, value in plain.items() if key != "megatron"}
    assert compare(earlier, plain, where="here") == []
