"""Tests of checkpoints with fused experts, and of quantized experts.

In each layer, fused experts have one tensor for the gate and up projections, and one for the down projection. Each
tensor contains all experts.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.local_experts import clamped_gate
from dpo_engine.model.weights.files import CheckpointFiles, check_tensors
from dpo_engine.model.weights.fused import dequantized
from dpo_engine.testing.ranks import run_ranks
from model.test_weights import assert_same_bits
from support.family_cases import OSS, checkpoint
from support.sharded import round_trip

SLOW = pytest.mark.slow
FILE = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts."


def fused_copy(directory, folder):
    """Save a copy of a checkpoint. In the copy, the experts are fused, as transformers holds them in memory."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(folder, save_original_format=False)
    return folder


@pytest.mark.parametrize(
    "case, layout",
    [
        ("qwen3_moe, some layers", {"ep": 2}),
        pytest.param("mixtral", {"tp": 2, "etp": 2, "ep": 2}, marks=SLOW),
        pytest.param("deepseek_v3", {"pp": 2, "ep": 2}, marks=SLOW),
        pytest.param("qwen2_moe", {"tp": 2}, marks=SLOW),
    ],
)
def test_experts_in_one_tensor_are_read_like_separate_ones(case, layout, tiny_hf, tmp_path):
    """The export has separate tensors again, as transformers saves them by default."""
    from dpo_engine.model.weights.load import weights_digest

    directory = checkpoint(tiny_hf, case)
    fused = fused_copy(directory, tmp_path / "fused")
    names = load_file(fused / FILE).keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) and not any("experts.0." in n for n in names)
    ranks = 4 if len(layout) > 1 else 2
    assert run_ranks(round_trip, ranks, directory=fused, layout=layout, export=tmp_path / "out") == [None] * ranks
    assert_same_bits(tmp_path / "out", directory)
    (digests,) = run_ranks(both_digests, 1, compute=weights_digest, directories=[directory, fused])
    assert digests[0] == digests[1]


def both_digests(compute, directories):
    from dpo_engine.testing.sharded import open_model

    _, arch, groups = open_model(directories[0], {})
    return [compute(arch, directory, groups=groups, key="model.path") for directory in directories]


def quantize(source, target):
    """Copy a checkpoint, and replace the experts' matrices in the copy with random MXFP4 matrices.

    The MXFP4 tensors have the same names as in the published checkpoints of gpt-oss.
    """
    shutil.copytree(source, target)
    tensors, generator = load_file(target / FILE), torch.Generator().manual_seed(7)
    for name in [name for name in tensors if name.endswith("_proj")]:
        count, columns, rows = tensors.pop(name).shape
        shape = (count, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 125, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, target / FILE, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def quantized(tiny_hf, tmp_path_factory):
    source = tiny_hf("gpt_oss", dtype=torch.bfloat16, pad_token_id=0, **{**OSS, "intermediate_size": 64})
    return quantize(source, tmp_path_factory.mktemp("quantized") / "model")


@pytest.mark.parametrize(
    "layout, ranks",
    [({"ep": 2}, 2), pytest.param({"tp": 2, "etp": 2, "ep": 2}, 4, marks=SLOW)],
    ids=["ep2", "tp2 etp2 ep2"],
)
def test_quantized_experts_are_read_as_by_transformers(layout, ranks, quantized, tmp_path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    export = tmp_path / "export"
    options = {"directory": quantized, "layout": layout, "export": export, "dtype": "bf16"}
    assert run_ranks(round_trip, ranks, **options) == [None] * ranks
    settings = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    expected = AutoModelForCausalLM.from_pretrained(quantized, **settings).state_dict()
    got = load_file(export / FILE)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name].view(torch.int16), value.bfloat16().view(torch.int16)), name
    config = json.loads((export / "config.json").read_text())
    assert "quantization_config" not in config
    reread = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(reread[name], value) for name, value in expected.items())


def test_every_quantized_number_is_that_of_transformers():
    """Combine every byte with every scale.

    The numbers with the largest scale are an exception: they must be NaN, as in the MX specification, and are not
    compared with the numbers of transformers.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    got, expected = dequantized(blocks, scales).transpose(1, 2), convert_moe_packed_tensors(blocks, scales)
    assert expected[..., :253].isfinite().all() and expected.count_nonzero() > 100_000
    assert torch.equal(got[..., :255].view(torch.int16), expected[..., :255].view(torch.int16))
    assert got[..., 255].isnan().all()


def problems(directory):
    with pytest.raises(ConfigError) as caught:
        check_tensors(CheckpointFiles(directory), read_architecture(directory))
    return [line.removeprefix(f"model.path={directory}: ") for line in caught.value.problems]


def changed(source, target, change):
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / FILE)
    change(tensors)
    save_file(tensors, target / FILE, metadata={"format": "pt"})
    return problems(target)


OTHER = "config.json or the file belongs to another model; download both again"


def test_what_does_not_fit_the_experts_is_refused(quantized, tiny_hf, tmp_path):
    plain, name = checkpoint(tiny_hf, "gpt_oss"), f"{EXPERTS}gate_up_proj"
    missing = f"tensor {name} is missing (for parameter decoder.layers.{{l}}.mlp.experts.local_experts.{{e}}.linear_fc1"
    assert changed(plain, tmp_path / "a", lambda t: t.pop(name)) == [
        f"{missing}.weight); download the checkpoint again, or correct config.json"
    ]
    assert changed(plain, tmp_path / "b", lambda t: t.update({name: t[name][:7].clone()})) == [
        f"tensor {name} in {FILE} has shape [7, 64, 96] and dtype F32, which do not fit 8 experts; {OTHER}"
    ]
    lines = changed(plain, tmp_path / "c", lambda t: t.update({name: t[name][:, :, :94].clone()}))
    assert lines[0] == (f"tensor {EXPERTS}0.gate_up_proj in {FILE} has shape [64, 94], expected [64, 96]; {OTHER}")
    scales = f"{name}_scales"
    assert changed(quantized, tmp_path / "d", lambda t: t.update({scales: t[scales][..., :1].clone()})) == [
        f"tensor {name}_blocks in {FILE} has shape [8, 128, 2, 16] and dtype U8, which do not fit 8 experts or "
        f"do not fit tensor {scales}; {OTHER}"
    ]
    lines = changed(quantized, tmp_path / "e", lambda t: t.pop(scales))
    assert lines[0].startswith(missing)
    assert lines[1].startswith(f"tensor {name}_blocks in {FILE} is not used by a gpt_oss model")


def test_an_expert_that_is_stored_twice_is_refused(tiny_hf, tmp_path):
    name, again = f"{EXPERTS}gate_up_proj", f"{EXPERTS}5.gate_up_proj"
    lines = changed(checkpoint(tiny_hf, "gpt_oss"), tmp_path, lambda t: t.update({again: t[name][5].clone()}))
    assert lines[-1].startswith(f"tensor {name} in {FILE} is not used by a gpt_oss model with this config.json;")


def test_files_that_lack_a_tensor_of_the_index_are_refused(quantized, tmp_path):
    scales, directory = f"{EXPERTS}gate_up_proj_scales", tmp_path / "model"
    shutil.copytree(quantized, directory)
    tensors = load_file(directory / FILE)
    index = {"weight_map": dict.fromkeys(tensors, FILE)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors[scales]
    save_file(tensors, directory / FILE)
    assert problems(directory) == [
        f"model.safetensors.index.json lists tensor {scales}, which is in no file; download the checkpoint again"
    ]


def test_other_quantization_is_refused(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="quantization_config=.*fp8.*: quantized weights cannot be trained"):
        read_architecture(tmp_path)


def test_gradients_of_the_clamped_gate():
    """Many of the inputs are beyond the clamp's limits, where gradients are zero."""
    both = (3 * torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    gate, up = both[:, :5], both[:, 5:]
    shut, near = torch.clamp(gate, max=1.5), torch.clamp(up, -1.5, 1.5)
    expected = (near + 1) * shut * torch.sigmoid(1.702 * shut)
    got = clamped_gate(both, 1.5, 1.702)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = [torch.autograd.grad((out * weight).sum(), both, retain_graph=True)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert (grads[0] == 0).sum() > 10
