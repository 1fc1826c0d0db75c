"""Tests of ``check`` and ``plan`` on mixtures of experts: layouts, settings of routers, sizes and memory."""

import json

import pytest

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.memory import memory
from dpo_engine.model.parameter_counts import active_parameters, parameters, stage_counts, stage_parameters
from dpo_engine.model.sizes import mlp_parameters
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.sharded import open_model
from dpo_engine.verbs.check import check
from dpo_engine.verbs.plan import plan
from dpo_engine.verbs.summary import summarize
from support.family_cases import MIXTURES, checkpoint

LAYOUTS = {
    "dp2 ep2": (2, {"ep": 2}),
    "tp2 etp1": (2, {"tp": 2, "etp": 1}),
    "pp2 vpp2 ep2": (4, {"pp": 2, "vpp": 2, "ep": 2}),
    "tp2 etp2 ep2": (4, {"tp": 2, "etp": 2, "ep": 2}),
}


@pytest.fixture
def problems(run_files, tiny_hf, tmp_path):
    """Return a function that lists the problems of a run, as in ``problems("qwen3_moe", 4, parallel={"ep": 2})``."""

    def find(model, world=None, **sections):
        directory = tiny_hf("llama") if model == "llama" else checkpoint(tiny_hf, model)
        return check(config_of(run_files, directory, tmp_path, **sections), world)

    return find


def config_of(files, directory, tmp_path, **sections):
    return Config.parse(
        {
            "model": {"path": str(directory), "tokenizer": files["tokenizer"]},
            "data": {"train": files["train"], "max_length": 64},
            "train": {"output_dir": str(tmp_path / "out"), **sections.pop("train", {})},
            **sections,
        }
    )


LAYOUT_PROBLEMS = [
    ({"ep": 3}, 3, "parallel.ep=3: must divide model.experts.count=8; use 1, 2, 4 or 8"),
    ({"etp": 5}, 5, "parallel.etp=5: must divide model.experts.ffn_hidden_size=48; use 1, 2, 3, 4, 6, 8, 12, 16, 24 "
     "or 48"),
    (
        {"tp": 2, "pp": 2, "ep": 4},
        4,
        "parallel.tp=2 x parallel.pp=2 x parallel.cp=1, and parallel.etp=1 x parallel.ep=4 in each of the 2 stages: "
        "the number of ranks must be a multiple of 8, but is 4; start 8 ranks, for example: torchrun --nproc-per-node "
        "8 -m dpo_engine train RUN.yaml",
    ),
    (
        {"tp": 2, "sequence_parallel": False},
        2,
        "parallel.sequence_parallel=false: is not possible with experts and tp > 1, because each tensor-parallel rank "
        "must send its own tokens to the experts; remove parallel.sequence_parallel",
    ),
]  # fmt: skip


@pytest.mark.parametrize("parallel, world, expected", LAYOUT_PROBLEMS, ids=str)
def test_impossible_layouts_of_experts_are_refused(parallel, world, expected, problems):
    assert problems("qwen3_moe", world, parallel=parallel) == [expected]


def test_biases_of_experts_are_split_along_the_hidden_dimension(problems):
    assert problems("gpt_oss", 3, parallel={"etp": 3}) == [
        "parallel.etp=3: must divide model.hidden_size=64; use 1, 2, 4, 8, 16, 32 or 64"
    ]


def test_shared_experts_are_split_like_other_mlps(problems):
    assert problems("glm4_moe", 4, parallel={"tp": 4}) == []
    assert problems("qwen2_moe", None, parallel={"tp": 8, "sequence_parallel": True}) == []


def test_settings_of_experts_are_refused_for_dense_models(problems):
    settings = {"loss": {"balance": 0.5, "router_z": 0.1}, "train": {"freeze_router": True}}
    why = "model type llama has no experts; remove"
    assert problems("llama", 2, parallel={"tp": 2, "etp": 1}, **settings) == [
        f"loss.balance=0.5: {why} loss.balance",
        f"loss.router_z=0.1: {why} loss.router_z",
        f"train.freeze_router=true: {why} train.freeze_router",
        "parallel.etp=1: model type llama has no experts; remove parallel.etp",
    ]


def test_frozen_routers_mean_nothing_with_adapters(problems):
    assert problems("qwen3_moe", train={"freeze_router": True}, adapter={}) == [
        "train.freeze_router=true: has no effect with an adapter, because only the adapter is trained; "
        "remove train.freeze_router"
    ]


def test_layout_is_refused_before_ranks_start():
    with pytest.raises(ConfigError) as caught:
        ParallelDims(tp=2, ep=4, world=2)
    assert str(caught.value) == (
        "parallel: etp=1 x ep=4 = 4 must divide the number of ranks of a pipeline stage, 2; start 4 ranks or a "
        "multiple of this number"
    )
    with pytest.raises(ConfigError, match="must divide the number of ranks, 4; start 6 ranks or a multiple of this"):
        ParallelDims(tp=3, ep=2, world=4)
    assert ParallelDims(tp=3, ep=2, world=6).dp == 2


def test_experts_are_split_over_tp_only_if_they_are_not_distributed():
    assert [ParallelDims(tp=2, ep=ep, world=4).etp for ep in (1, 2)] == [2, 1]
    assert ParallelDims(tp=2, ep=2, world=8).expert_dp == 4


def sizes_on_rank(directory, layout):
    chunks, _, groups = open_model(directory, layout)
    named = [(name, parameter.numel()) for chunk in chunks for name, parameter in chunk.named_parameters()]
    experts = sum(size for name, size in named if ".local_experts." in name)
    return groups.pp.rank(), sum(size for _, size in named) - experts, experts


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if (case, layout) == ("glm4_moe", "dp2 ep2") else pytest.mark.slow)
        for number, case in enumerate(MIXTURES)
        for layout in {[*LAYOUTS][number % 4], *(["dp2 ep2"] if case == "glm4_moe" else [])}
    ],
)
def test_parameters_of_each_rank(case, layout, tiny_hf):
    directory = checkpoint(tiny_hf, case)
    arch, (world, sizes) = read_architecture(directory), LAYOUTS[layout]
    dims = ParallelDims(**sizes, world=world)
    for stage, others, experts in run_ranks(sizes_on_rank, world, directory=directory, layout=sizes):
        assert stage_counts(arch, dims, stage) == (others, experts)
        assert stage_parameters(arch, dims, stage) == others + experts


@pytest.mark.parametrize("case", MIXTURES)
def test_active_parameters(case, tiny_hf):
    from transformers import AutoModelForCausalLM

    directory = checkpoint(tiny_hf, case)
    arch = read_architecture(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    stored = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("correction_bias"))]
    used = arch.experts.chosen / arch.experts.count
    weights = {name: tensor.numel() * (used if ".experts." in name else 1) for name, tensor in stored}
    matrices = {
        name for name, tensor in stored if tensor.dim() > 1 and not name.endswith(("embed_tokens.weight", "bias"))
    }
    assert parameters(arch) == sum(tensor.numel() for _, tensor in stored)
    assert active_parameters(arch) == sum(weights.values())
    assert arch.matrix_parameters == sum(weights[name] for name in matrices)
    mlps = sum(weights[name] for name in matrices if ".mlp." in name)
    assert sum(mlp_parameters(arch, layer) for layer in arch.layers()) == mlps


def test_optimizer_state_of_experts_is_sharded_over_their_copies(run_files, tiny_hf, tmp_path):
    directory = checkpoint(tiny_hf, "qwen3_moe")
    arch, config = read_architecture(directory), config_of(run_files, directory, tmp_path, parallel={"ep": 2})
    dims = ParallelDims(ep=2, world=4)
    others, experts = stage_counts(arch, dims, 0)
    cost = memory(config, arch, dims, dtype="bf16", tokens=128)
    assert cost.optimizer == 12 * others // 4 + 12 * experts // 2
    assert cost.formula == (
        f"{others + experts:,} parameters x (2 weight + 4 gradient + 12 optimizer / 4 (dp x cp) [/ 2 for the "
        f"{experts:,} parameters of experts] + 2 reference) bytes"
    )


def test_summary_shows_experts(run_files, tiny_hf, tmp_path):
    directory = checkpoint(tiny_hf, "qwen3_moe")
    lines = summarize(config_of(run_files, directory, tmp_path, parallel={"tp": 2, "ep": 2}), 4)
    arch = read_architecture(directory)
    assert f", of which a token uses {active_parameters(arch) / 1e3:.3g} K ({active_parameters(arch):,})" in lines[0]
    assert any("experts: ep 2 x etp 1 x dp 2 in each stage" in line for line in lines)
    assert any("optimizer state sharded over 2 ranks, and the experts' state over 2" in line for line in lines)


QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def test_plan_offers_expert_parallelism(run_files, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    arch = read_architecture(tmp_path)
    assert (round(parameters(arch) / 1e9, 1), round(active_parameters(arch) / 1e9, 1)) == (30.5, 3.4)
    data = {"train": run_files["train"], "max_length": 2048}
    run = config_of(run_files, tmp_path, tmp_path, reference={"mode": "stored"}, data=data)
    lines = plan(run, 8)
    place = next(index for index, line in enumerate(lines) if ", ep 8: " in line)
    assert ", ep " in lines[place + 2] and ", ep " in lines[place + 3]  # predicted seconds, and sent bytes
