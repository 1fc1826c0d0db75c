"""Tests of loading and saving checkpoints.

In every layout, logits must match those of transformers, and exports must be bitwise equal to the checkpoint.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.families.rule import Rule
from dpo_engine.model.weights.table import Piece, pieces
from dpo_engine.testing.comparison import assert_same_bits
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.sharded import open_model
from dpo_engine.testing.trajectory import load_weights
from support.sharded import round_trip

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
}


def transformers_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(515, (2, 48), generator=torch.Generator().manual_seed(5))


def cases():
    """Yield every model with every layout.

    For all models except ``llama``, the layouts ``one``, ``tp2`` and ``pp2`` are marked slow.
    """
    for model in MODELS:
        for layout in LAYOUTS:
            contained = model != "llama" and layout in ("one", "tp2", "pp2")
            yield pytest.param(model, layout, marks=pytest.mark.slow if contained else ())


@pytest.mark.parametrize("model, layout", list(cases()))
def test_logits_match_transformers_and_export_is_bitwise(model, layout, tiny_hf, tokens, tmp_path):
    family, options = MODELS[model]
    directory = tiny_hf(family, **options)
    world, dims = LAYOUTS[layout]
    results = run_ranks(
        round_trip,
        world,
        directory=directory,
        layout=dims,
        tokens=tokens,
        export=tmp_path / "hf",
        max_shard_bytes=70_000,
    )
    expected = transformers_logits(directory, tokens)
    got = results[-1]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_bits(tmp_path / "hf", directory)
    assert torch.equal(transformers_logits(tmp_path / "hf", tokens), expected)


@pytest.mark.parametrize(
    "world, layout, options",
    [
        (4, {"tp": 4}, {"num_key_value_heads": 2}),
        (4, {"pp": 2}, {"tie_word_embeddings": True}),
        (4, {"tp": 2, "cp": 2}, {}),
        (4, {"pp": 2, "vpp": 2, "tp": 2}, {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_more_layouts(world, layout, options, tiny_hf, tokens, tmp_path):
    directory = tiny_hf("llama", **options)
    results = run_ranks(round_trip, world, directory=directory, layout=layout, tokens=tokens, export=tmp_path / "hf")
    expected = transformers_logits(directory, tokens)
    for got in results:
        assert got is None or (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_bits(tmp_path / "hf", directory)


@pytest.mark.parametrize("computed", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", ["one", "tp2 pp2"])
def test_bf16_checkpoint_exports_in_bf16_for_any_compute_dtype(layout, computed, tiny_hf, tmp_path):
    directory = tiny_hf("qwen2", dtype=torch.bfloat16)
    world, dims = LAYOUTS[layout]
    run_ranks(round_trip, world, directory=directory, layout=dims, export=tmp_path / "hf", dtype=computed)
    assert_same_bits(tmp_path / "hf", directory)
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert saved == json.loads((directory / "config.json").read_text())


def test_requested_dtype_is_exported_and_written_to_the_config(tiny_hf, tmp_path):
    directory = tiny_hf("qwen2", dtype=torch.bfloat16)
    export = tmp_path / "hf"
    run_ranks(export_as, 2, directory=directory, layout={"tp": 2}, export=export, dtype=torch.float32)
    expected = load_weights(directory)
    for name, value in load_weights(export).items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float()), name
    assert json.loads((export / "config.json").read_text())["dtype"] == "float32"


def export_as(directory, layout, export, dtype):
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    chunks, arch, groups = open_model(directory, layout)
    load_hf(chunks, arch, directory, groups=groups)
    save_hf(chunks, arch, export, source=directory, groups=groups, dtype=dtype)


def test_sharded_files_are_read_and_written_with_an_index(tiny_hf, tmp_path):
    directory = tiny_hf("llama", max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    limit = 150_000
    run_ranks(round_trip, 2, directory=directory, layout={"pp": 2}, export=tmp_path / "hf", max_shard_bytes=limit)
    assert_same_bits(tmp_path / "hf", directory)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        held = load_file(tmp_path / "hf" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= limit
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in load_weights(directory).values())


def test_padding_rows_are_zero(tiny_hf):
    for low, high, total in run_ranks(padding, 4, directory=tiny_hf("llama"), layout={"tp": 4}):
        assert (low, high) == (0.0, 0.0) and total == 544 - 515


def padding(directory, layout):
    from dpo_engine.model.weights.load import load_hf

    chunks, arch, groups = open_model(directory, layout)
    load_hf(chunks, arch, directory, groups=groups)
    rows = chunks[0].output_layer.weight.detach()
    parts = [torch.empty_like(rows) for _ in range(groups.tp.size())]
    torch.distributed.all_gather(parts, rows, group=groups.tp)
    rest = torch.cat(parts)[arch.vocab_size :]
    return rest.min().item(), rest.max().item(), rest.shape[0]


def doctored(directory: Path, target: Path, **changes) -> Path:
    """Copy a checkpoint, and add or replace tensors in the copy.

    None removes a tensor. ``__`` in a name stands for a dot.
    """
    held = load_weights(directory)
    for name, value in changes.items():
        held[name.replace("__", ".")] = value
    target.mkdir()
    save_file({name: value for name, value in held.items() if value is not None}, target / "model.safetensors")
    (target / "config.json").write_text((directory / "config.json").read_text())
    return target


def test_bad_checkpoint_gives_the_same_lines_on_all_ranks(tiny_hf, tmp_path):
    bad = doctored(
        tiny_hf("llama"),
        tmp_path / "bad",
        model__norm__weight=None,
        model__layers__2__mlp__up_proj__weight=torch.zeros(96, 60),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(64),
    )
    for problems in run_ranks(round_trip, 2, directory=bad, layout={"pp": 2}):
        assert problems == [
            f"model.path={bad}: tensor model.norm.weight is missing (for parameter decoder.final_layernorm.weight); "
            "download the checkpoint again, or correct config.json",
            f"model.path={bad}: tensor model.layers.2.mlp.up_proj.weight in model.safetensors has shape [96, 60], "
            "expected [96, 64]; config.json or the file belongs to another model; download both again",
            f"model.path={bad}: tensor model.layers.0.self_attn.q_proj.bias in model.safetensors is not "
            "used by a llama model with this config.json; correct config.json, or remove the tensor",
        ]


def test_checkpoint_of_another_architecture_is_refused(tiny_hf):
    other = tiny_hf("llama", rms_norm_eps=1e-6)
    [problems] = run_ranks(round_trip, 1, directory=other, layout={}, arch_directory=tiny_hf("llama"))
    assert problems == [
        f"model.path={other}: must have the policy's architecture, but has norm_eps=1e-06 instead of 1e-05; use a "
        "checkpoint with the same architecture"
    ]


def test_parameter_without_a_rule_is_refused(tiny_hf):
    directory = tiny_hf("llama")
    [lines] = run_ranks(load_with_stranger, 1, directory=directory)
    assert lines == [
        "parameter decoder.layers.1.mlp.stranger: model family 'llama' has no rule for it",
        "parameter decoder.final_layernorm.weight: has shape [60], but its rule gives [64]",
        f"model.path={directory}: tensor model.layers.0.input_layernorm.weight was not loaded into any parameter of "
        "the model",
        "tensor model.layers.0.input_layernorm.weight: must be written exactly once, by a single rank",
    ]


def load_with_stranger(directory):
    from dpo_engine.errors import EngineError
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    chunks, arch, groups = open_model(directory, {})
    layer, block = chunks[0].decoder.layers[1].mlp, chunks[0].decoder
    lines = []

    def attempt(action, **options):
        try:
            action(chunks, arch, groups=groups, **options)
        except EngineError as error:
            lines.extend(error.problems)

    layer.stranger = torch.nn.Parameter(torch.zeros(1))
    attempt(load_hf, directory=directory)
    del layer.stranger
    whole, block.final_layernorm.weight = block.final_layernorm.weight, torch.nn.Parameter(torch.zeros(60))
    attempt(load_hf, directory=directory)
    block.final_layernorm.weight = whole
    chunks[0].decoder.layers[0].input_layernorm = torch.nn.Identity()
    attempt(load_hf, directory=directory)
    attempt(save_hf, directory=directory.parent / "never", source=directory)
    assert not (directory.parent / "never").exists()
    return lines


def test_fused_names_of_transformer_engine_are_read(tiny_hf):
    for name, value in run_ranks(load_fused_names, 1, directory=tiny_hf("llama"))[0].items():
        expected = load_weights(tiny_hf("llama"))[name]
        assert torch.equal(value, expected)


def load_fused_names(directory):
    from dpo_engine.model.weights.load import load_hf

    chunks, arch, groups = open_model(directory, {})
    for layer in chunks[0].decoder.layers:
        for norm, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            linear.layer_norm_weight = getattr(layer, norm).weight
            setattr(layer, norm, torch.nn.Identity())
    load_hf(chunks, arch, directory, groups=groups)
    layer = chunks[0].decoder.layers[3]
    return {
        "model.layers.3.input_layernorm.weight": layer.self_attention.linear_qkv.layer_norm_weight.data,
        "model.layers.3.post_attention_layernorm.weight": layer.mlp.linear_fc1.layer_norm_weight.data,
    }


def rows_of(tensor, start, stop, at, step=1):
    return Piece(tensor, slice(start, stop, step), slice(at, at + -(-(stop - start) // step)))


def test_pieces_of_fused_rows(tiny_hf):
    arch = read_architecture(tiny_hf("llama", num_hidden_layers=1, num_key_value_heads=2))
    qkv = Rule("p", ("q", "k", "v"), ("query_size", "kv_size", "kv_size"), None, "qkv", 0)
    expected = [rows_of(0, 32, 64, 0), rows_of(1, 8, 16, 32), rows_of(2, 8, 16, 40)]
    assert pieces(qkv, arch, shard_rows=48, rank=1, tp=2) == expected
    glu = Rule("p", ("gate", "up"), ("ffn_hidden_size", "ffn_hidden_size"), None, "glu", 0)
    expected = [rows_of(0, 48, 96, 0), rows_of(1, 48, 96, 48)]
    assert pieces(glu, arch, shard_rows=96, rank=1, tp=2) == expected
    mixed = Rule("p", ("both",), ("ffn_hidden_size", "ffn_hidden_size"), None, "glu", 0, interleaved=True)
    expected = [rows_of(0, 96, 191, 0, 2), rows_of(0, 97, 192, 48, 2)]
    assert pieces(mixed, arch, shard_rows=96, rank=1, tp=2) == expected
    vocab = Rule("p", ("e",), ("vocab_size",), None, "vocab", 0)
    assert pieces(vocab, arch, shard_rows=264, rank=1, tp=2) == [rows_of(0, 264, 515, 0)]
    assert pieces(vocab, arch, shard_rows=520, rank=1, tp=2) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_weights_are_not_exported(value, tiny_hf, tmp_path):
    for problems in run_ranks(export_broken, 4, directory=tiny_hf("llama"), export=tmp_path / "hf", value=value):
        assert problems == [
            "tensor model.layers.2.mlp.gate_proj.weight: contains values that are not finite in torch.float32; nothing "
            "was exported; export an earlier step, or set a dtype with a wider range"
        ]
    assert list(tmp_path.iterdir()) == []


def export_broken(directory, export, value):
    from dpo_engine.errors import NumbersError
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    chunks, arch, groups = open_model(directory, {"tp": 2, "pp": 2})
    load_hf(chunks, arch, directory, groups=groups)
    if groups.tp.rank() == 1 and groups.last_stage:
        chunks[0].decoder.layers[0].mlp.linear_fc1.weight.data[0, 0] = value
    try:
        save_hf(chunks, arch, export, source=directory, groups=groups)
    except NumbersError as error:
        return error.problems


def test_full_disk_on_one_stage_ends_all_ranks_and_leaves_no_files(tiny_hf, tmp_path):
    for problems in run_ranks(export_to_full_disk, 4, directory=tiny_hf("llama"), export=tmp_path / "hf"):
        assert problems == [
            f"{tmp_path / 'hf'}: cannot be written ([Errno 28] No space left on device); fix this and export again"
        ]
    assert list(tmp_path.iterdir()) == []


def export_to_full_disk(directory, export):
    from dpo_engine.errors import CheckpointError
    from dpo_engine.model.weights import shard_files
    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    chunks, arch, groups = open_model(directory, {"tp": 2, "pp": 2})
    load_hf(chunks, arch, directory, groups=groups)
    if groups.last_stage:
        shard_files.save_file = refuse
    try:
        save_hf(chunks, arch, export, source=directory, groups=groups, max_shard_bytes=10_000)
    except CheckpointError as error:
        return error.problems


def anonymous_and_mapped_bytes(reset: bool) -> int:
    """Return the peak of this process's resident memory in bytes, including mapped files (Linux only).

    reset  whether to reset the peak first
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_loading_and_saving_never_hold_the_whole_model(tiny_hf, tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    directory = tiny_hf("llama", max_shard_size="16MB", **wide)
    total = sum(value.nbytes for value in load_weights(directory).values())
    [(loading, saving)] = run_ranks(peaks, 1, directory=directory, export=tmp_path / "hf", shard=16_000_000)
    assert total > 125e6
    # The limit is the memory for two files and for three copies of one fused tensor. Two files are needed because a
    # layer can span two files. Two copies are needed, and the third copy is a margin.
    allowed = 2 * 16e6 + 3 * 2 * 2048 * 512 * 4
    assert loading < allowed and saving < allowed, f"{loading / 1e6:.0f} MB, {saving / 1e6:.0f} MB of {total / 1e6:.0f}"


def peaks(directory, export, shard):
    import gc

    from dpo_engine.model.weights.load import load_hf
    from dpo_engine.model.weights.save import save_hf

    chunks, arch, groups = open_model(directory, {})
    grown = []
    for action, options in (
        (load_hf, {"directory": directory}),
        (save_hf, {"directory": export, "source": directory, "max_shard_bytes": shard}),
    ):
        gc.collect()
        before = anonymous_and_mapped_bytes(reset=True)
        action(chunks, arch, groups=groups, **options)
        grown.append(anonymous_and_mapped_bytes(reset=False) - before)
    return grown
