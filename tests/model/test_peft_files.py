"""Tests of adapters in PEFT files: reading, writing, merging, and errors about invalid files and settings."""

import json

import pytest
import torch

from dpo_engine.errors import ConfigError
from dpo_engine.model.adaptation import Adaptation, adapter_shapes
from dpo_engine.model.adaptation_problems import adaptation_problems
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.peft import (
    adapter_config,
    adapter_digest,
    adapter_facts,
    adapter_problems,
    read_adaptation,
)
from dpo_engine.testing.hf_training import in_fp64
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import load_weights, run_config
from support.family_cases import checkpoint
from support.peft_adapters import PROJECTIONS, adapter_tensors, make_adapter

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "patterns": {
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 7, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"q_proj": 16},
    },
    "regular expression": {"use_dora": True, "target_modules": r".*\.[13]\.self_attn\.(k|o)_proj"},
    "layers": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1, 2]},
}


def exported(config):
    """Load the run's initial model, and export the merged model and the adapter. Return the log line about rounding."""
    from dpo_engine.model.weights.save import save_hf
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.exporting import merge_of, save_adapter

    engine, target = Engine.open(config), f"{config.train.output_dir}/hf"
    chunks = engine.load_start()
    merge = merge_of(engine, chunks)
    save_hf(chunks, engine.arch, target, source=config.model.path, groups=engine.groups, change=merge)
    save_adapter(engine, merge, target)
    lost = merge.rounding(engine.groups.world)
    engine.close()
    return lost


CELLS = [
    ("tp2 pp2", 4, {"tp": 2, "pp": 2}, "dora"),
    ("tp4, 2 kv heads", 4, {"tp": 4}, "patterns"),
    ("one", 1, {}, "regular expression"),
    ("one lora", 1, {}, "lora"),
    ("pp2 vpp2", 2, {"pp": 2, "vpp": 2}, "layers"),
    ("tp4 dora", 4, {"tp": 4}, "dora"),
    ("dp2", 2, {}, "regular expression"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "ranks, layout, kind",
    [pytest.param(*cell, id=name, marks=pytest.mark.slow if at > 1 else ()) for at, (name, *cell) in enumerate(CELLS)],
)
def test_peft_adapter_is_exported_unchanged_and_merged_as_by_peft(ranks, layout, kind, dtype, tiny_hf, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_hf("qwen2", num_key_value_heads=2, dtype=dtype)
    adapter = make_adapter(model, tmp_path / "start", up=0.002, **KINDS[kind])
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    config = run_config(
        model, tmp_path / "out", model={"path": str(model), "dtype": precision}, adapter={"path": str(adapter)},
        parallel=layout,
    )  # fmt: skip
    (lost, *_) = run_ranks(exported, ranks, config=config)

    found, start = adapter_tensors(tmp_path / "out/hf_adapter"), adapter_tensors(adapter)
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], value) for name, value in start.items())

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    weights = load_weights(tmp_path / "out/hf")
    assert all(torch.equal(value, merged[name]) for name, value in weights.items())
    before = {name: value for name, value in load_weights(model).items() if not torch.equal(value, weights[name])}
    assert before, "the adapter must change some weights"
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    change, error = (
        torch.cat([(exact[name] - other[name]).flatten().double() for name in before]).norm()
        for other in (before, weights)
    )
    if dtype is torch.float32:
        assert lost == "rounding the merged weights loses almost nothing of the adapter's contribution"
    else:
        assert 0.05 < error / change < 0.95
        assert f"changes the adapter's contribution by {float(error / change):.0%}; use the adapter itself" in lost

    ids = torch.arange(3, 40)[None]
    ours, theirs = (PeftModel.from_pretrained(in_fp64(model), path).double()(ids).logits for path in
                    (tmp_path / "out/hf_adapter", adapter))  # fmt: skip
    assert torch.equal(ours, theirs)


def adaptation(model, **keys):
    from dpo_engine.config.sections import AdapterConfig

    return Adaptation.of(AdapterConfig(**keys), read_architecture(str(model)))


@pytest.mark.parametrize(
    "settings",
    [
        *KINDS.values(),
        {"rank_pattern": {"proj": 3, "q_proj": 5}},  # both patterns match q_proj; the first match applies
        {"rank_pattern": {"q_proj": 5, r".*\.0\..*": 6}, "alpha_pattern": {r"[kv]_proj": 3}},
        {"target_modules": ["model.layers.2.mlp.up_proj", "q_proj"], "layers_to_transform": 0},
    ],
    ids=str,
)
def test_the_same_projections_have_adapters_as_in_peft(settings, tiny_hf, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, arch = tiny_hf("qwen3"), read_architecture(str(tiny_hf("qwen3")))
    given = {"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), **settings}
    LoraConfig(task_type="CAUSAL_LM", **given).save_pretrained(tmp_path)  # PEFT sorts the patterns
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig.from_pretrained(tmp_path))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    found = read_adaptation(tmp_path, arch)
    assert {name: tuple(shape) for name, shape in adapter_shapes(found, arch).items()} == expected

    # If PEFT loads the engine's file and saves it again, PEFT sorts the patterns. The sorted patterns must give every
    # projection the same rank and scale.
    (tmp_path / "again").mkdir()
    (tmp_path / "again/adapter_config.json").write_text(adapter_config(found, arch, "base"))
    LoraConfig.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "last")
    last = read_adaptation(tmp_path / "last", arch)
    assert {name: tuple(shape) for name, shape in adapter_shapes(last, arch).items()} == expected


REFUSED = {
    "peft_type": ("IA3", "peft_type='IA3': only LORA (also with use_dora or use_rslora) is supported"),
    "bias": ("all", 'bias="all": is not supported (the engine\'s adapters contain no biases'),
    "modules_to_save": (["lm_head"], 'modules_to_save=["lm_head"]: is not supported (the engine\'s adapters'),
    "target_parameters": (["x"], 'target_parameters=["x"]: is not supported (parameters outside of'),
    "fan_in_fan_out": (True, "fan_in_fan_out=true: is not supported (the model's linear layers store"),
    "layer_replication": ([[0, 2]], "layer_replication=[[0, 2]]: is not supported (it changes the number of layers)"),
    "layers_pattern": ("h", 'layers_pattern="h": is not supported (layers are numbered'),
    "use_qalora": (True, "use_qalora=true: is not supported (the engine's adapters do not have this feature)"),
    "a_new_feature": ({"x": 1}, 'a_new_feature={"x": 1}: is not supported (the engine\'s adapters do not have'),
    "init_lora_weights": ("pissa_niter_4", 'init_lora_weights="pissa_niter_4": may also change the base weights'),
    "use_dora": ("false", 'use_dora="false": must be true or false; correct it'),
    "another_feature": (0, "another_feature=0: is not supported (the engine's adapters do not have"),
    "r": (0, "r=0: must be a whole number above 0; correct it"),
    "lora_alpha": (10**400, "must be a number above 0 and below 1e30; correct it"),
    "alpha": ("8", 'alpha="8": is not supported'),
    "use_rslora": (1, "use_rslora=1: must be true or false; correct it"),
    "lora_bias": ("8", 'lora_bias="8": is not supported'),
    "-lora_alpha": ("8", 'lora_alpha="8": must be a number above 0 and below 1e30; correct it'),
    "rank_pattern": (
        {"q_proj": 0},
        'rank_pattern={"q_proj": 0}: must be an object whose values are whole numbers above 0; correct it',
    ),
    "alpha_pattern": ([], None),
    "layers_to_transform": (
        [-1],
        "layers_to_transform=[-1]: must be the index of a layer, or a list of such indices; correct it",
    ),
    "target_modules": ([], "target_modules: must be a list of names or a regular expression; correct it"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_and_invalid_settings_in_files_are_refused(field, tiny_hf, tmp_path):
    value, expected = REFUSED[field]
    arch = read_architecture(str(tiny_hf("llama")))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], field.lstrip("-"): value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        read_adaptation(tmp_path, arch)
    assert f"adapter.path={tmp_path}: adapter_config.json: " in str(error.value)
    assert (expected or "alpha_pattern=[]: must be an object whose values are numbers above 0") in str(error.value)


def test_adapter_files_are_compared_with_the_model(tiny_hf, tmp_path):
    from safetensors.torch import save_file

    from dpo_engine.config.sections import AdapterConfig

    model = tiny_hf("llama", num_hidden_layers=2)
    arch, adapter = read_architecture(str(model)), tmp_path / "a"
    asked = AdapterConfig(path=str(adapter))
    assert adapter_problems(asked, arch) == [
        f"adapter.path={adapter}: has no adapter_config.json; set it to the directory of a PEFT adapter"
    ]
    make_adapter(model, adapter, target_modules=["q_proj"])
    assert adapter_problems(asked, arch) == []
    assert adapter_problems(AdapterConfig(path=str(adapter), rank=3), arch) == [
        "adapter.rank=3: cannot be set, because the files at adapter.path already set rank; remove adapter.rank"
    ]
    tensors = adapter_tensors(adapter)
    first, second, *_ = sorted(tensors)
    prefix = f"adapter.path={adapter}: adapter_model.safetensors: "

    def problems_with(changes):
        changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        save_file(changed, adapter / "adapter_model.safetensors")
        *problems, last = adapter_problems(asked, arch)
        assert last == (
            f"adapter.path={adapter}: the adapter does not fit model.path; save it again with PEFT or use another "
            "adapter"
        )
        return problems

    assert problems_with({first: None, "base_model.model.lm_head.lora_A.weight": torch.zeros(2, 3)}) == [
        f"{prefix}tensor {first} is missing",
        f"{prefix}tensor base_model.model.lm_head.lora_A.weight has no place in the model",
    ]
    assert problems_with({first: torch.zeros(5, 64), second: tensors[second].double()}) == [
        f"{prefix}tensor {first} has shape [5, 64], expected [4, 64]",
        f"{prefix}tensor {second} has dtype F64; convert it to bf16, fp16 or fp32",
    ]
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin: pickled weights are refused" in adapter_problems(asked, arch)[0]
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read (" in adapter_problems(asked, arch)[0]


SETTINGS = [
    ({"targets": ["q_porj"]}, "adapter.targets[0]=q_porj: matches no projection; did you mean q_proj?"),
    (
        {"targets": ["x"]},
        "adapter.targets[0]=x: matches no projection; the model has q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj and down_proj",
    ),
    (
        {"targets": ["q_proj", "lm_head"]},
        "adapter.targets[1]=lm_head: cannot be adapted, because the engine computes the output layer and the "
        "log-probabilities in one operation, which has no adapters; remove this target",
    ),
    (
        {"targets": ["embed_tokens"]},
        "adapter.targets[0]=embed_tokens: cannot be adapted, because an embedding is not a projection; remove this "
        "target",
    ),
    (
        {"targets": "("},
        "adapter.targets: ( is not a regular expression (missing ), unterminated subpattern at position 0); correct it",
    ),
    (
        {"targets": "q_proj"},
        "adapter.targets=q_proj: a text is read as a regular expression, which must match whole names; write the list "
        "[q_proj]",
    ),
    ({"targets": "q_porj"}, "adapter.targets=q_porj: matches no projection; did you mean q_proj?"),
    (
        {"targets": ".*"},
        "adapter.targets=.*: matches lm_head, which cannot be adapted, because the engine computes the output "
        "layer and the log-probabilities in one operation, which has no adapters; restrict the expression",
    ),
    (
        {"rank_pattern": {"(?i)q_proj": 3}},
        "adapter.rank_pattern: (?i)q_proj is not a regular expression (global flags not at the start of the "
        "expression at position 8); correct it",
    ),
    ({"layers": [4]}, "adapter.layers: contains 4, but the model's layers are 0 to 3; remove 4"),
    (
        {"targets": ".*q_proj", "layers": [0]},
        "adapter.layers: requires a list of names in adapter.targets, but adapter.targets is a regular expression; put "
        "the layers into this expression",
    ),
    (
        {"rank_pattern": {"lm_head": 3}},
        "adapter.rank_pattern: lm_head matches no adapted projection; remove this expression",
    ),
    ({"alpha_pattern": {"x(": 3}}, None),
]


@pytest.mark.parametrize("keys, expected", SETTINGS, ids=[str(keys) for keys, _ in SETTINGS])
def test_messages_about_settings(keys, expected, tiny_hf):
    from dpo_engine.config.sections import AdapterConfig

    (problem,) = adaptation_problems(AdapterConfig(**keys), read_architecture(str(tiny_hf("llama"))))
    assert problem == expected or (expected is None and "x( is not a regular expression" in problem)


NO_TARGETS = [
    (
        ["q_proj", "gate_proj"],
        "adapter.targets[1]=gate_proj: matches matrices of experts, which have no adapters; write whole names, such as "
        "model.layers.0.mlp.gate_proj, or remove this target",
    ),
    (
        ["experts.0.up_proj"],
        "adapter.targets[0]=experts.0.up_proj: matches matrices of experts, which have no adapters; remove this target",
    ),
    (
        ".*_proj",
        "adapter.targets=.*_proj: matches model.layers.1.mlp.experts.0.gate_proj, which cannot be adapted, "
        "because experts have no adapters; restrict the expression",
    ),
    (["gate"], "adapter.targets[0]=gate: matches no projection; did you mean gate_proj?"),
]


@pytest.mark.parametrize("targets, expected", NO_TARGETS, ids=str)
def test_experts_and_routers_are_no_targets(targets, expected, tiny_hf):
    from dpo_engine.config.sections import AdapterConfig

    arch = read_architecture(str(checkpoint(tiny_hf, "qwen3_moe, some layers")))
    assert adaptation_problems(AdapterConfig(targets=targets), arch) == [expected]


def test_attention_of_gpt_oss_is_adapted_but_not_its_experts(tiny_hf):
    from dpo_engine.config.sections import AdapterConfig

    directory = checkpoint(tiny_hf, "gpt_oss")
    arch = read_architecture(str(directory))
    assert adapter_problems(AdapterConfig(), arch) == []
    shapes = adapter_shapes(Adaptation.of(AdapterConfig(), arch), arch)
    assert {name.rpartition("self_attn.")[2] for name in shapes} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapter_problems(AdapterConfig(targets=["gate_up_proj"]), arch) == [
        "adapter.targets[0]=gate_up_proj: matches matrices of experts, which have no adapters; remove this target"
    ]
    assert adapter_problems(AdapterConfig(targets=["router"]), arch) == [
        "adapter.targets[0]=router: matches no projection; the model has q_proj, k_proj, v_proj and o_proj"
    ]


def test_all_linear_is_every_projection_outside_of_routed_experts(tiny_hf):
    from dpo_engine.config.sections import AdapterConfig

    arch = read_architecture(str(checkpoint(tiny_hf, "glm4_moe")))
    shapes = adapter_shapes(Adaptation.of(AdapterConfig(), arch), arch)
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert {name.removeprefix("model.layers.0.") for name in shapes if ".0." in name} == attention | {
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert {name.removeprefix("model.layers.1.") for name in shapes if ".1." in name} == attention | {
        f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
    }


def test_targets_that_are_no_projections_are_refused(tiny_hf, tmp_path):
    arch = read_architecture(str(tiny_hf("llama")))
    config = {"peft_type": "LORA", "target_modules": ["q_proj", "input_layernorm", "not_in_this_model"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"json: target_modules\[1\]=input_layernorm: matches no projection"):
        read_adaptation(tmp_path, arch)


def test_the_digest_depends_on_the_scale_but_not_on_the_order_of_names(tiny_hf, tmp_path):
    model = tiny_hf("llama", num_hidden_layers=2)
    arch, facts, digests = read_architecture(str(model)), [], []
    make_adapter(model, tmp_path, target_modules=["q_proj", "k_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({}, {"target_modules": config["target_modules"][::-1]}, {"lora_alpha": 64}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        digests.append(adapter_digest(tmp_path))
        facts.append(adapter_facts(read_adaptation(tmp_path, arch), digests[-1]))
    assert facts[0] == facts[1] and facts[0] != facts[2]
    assert digests[0] == digests[1] and digests[0] != digests[2]
    assert facts[2]["adapter.alpha"] == "64.0" and adapter_facts(None, None) == {}


def test_tp_must_divide_the_rows_of_the_key_projection(tiny_hf):
    from dpo_engine.config.sections import AdapterConfig

    arch = read_architecture(str(tiny_hf("llama", num_key_value_heads=1, head_dim=6)))
    assert adapter_problems(AdapterConfig(), arch, 4) == [
        "parallel.tp=4: must divide the 6 rows of the key projection if there are adapters; lower it"
    ]


def drawn_adapters(config):
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.exporting import merge_of, save_adapter

    engine = Engine.open(config)
    save_adapter(engine, merge_of(engine, engine.load_start()), f"{config.train.output_dir}/hf")
    engine.close()


def test_new_adapters_have_the_same_bits_in_every_layout(tiny_hf, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, found = tiny_hf("llama", num_key_value_heads=2), []
    for ranks, layout in ((1, {}), (4, {"tp": 4}), (4, {"tp": 2, "pp": 2})):
        out = tmp_path / str(len(found))
        config = run_config(model, out, adapter={"kind": "dora", "rank": 4}, parallel=layout)
        run_ranks(drawn_adapters, ranks, config=config)
        found.append(adapter_tensors(out / "hf_adapter"))
    one, *others = found
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in one.items())

    # New adapters have the same distribution as PEFT's new adapters. DoRA's magnitudes are the norms of the rows of the
    # base weights.
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=list(PROJECTIONS), use_dora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(base, settings)
    for name, value in theirs.named_parameters():
        if "lora_A" in name:
            ours = one[name.replace(".default", "")]
            assert ours.abs().max() <= value.shape[1] ** -0.5
            assert float(ours.square().mean() * value.shape[1]) == pytest.approx(1 / 3, rel=0.3)
        elif "lora_B" in name:
            assert not one[name.replace(".default", "")].any()
        elif "magnitude" in name:
            ours = one[name.replace(".default.weight", "")]
            assert torch.allclose(ours, value, rtol=1e-6)
