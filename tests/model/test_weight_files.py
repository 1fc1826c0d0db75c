"""Tests of checkpoint files: valid files can be read, and errors about defects name the tensor or the file."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.files import CheckpointFiles, check_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny_hf, tmp_path):
    """Return a function that copies a tiny checkpoint and returns the copy's directory. A test can damage the copy."""

    def make(family="llama", *, sharded=False, **options):
        source = tiny_hf(family, **options, **({"max_shard_size": "200KB"} if sharded else {}))
        target = tmp_path / "model"
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return make


def change(directory, **changes):
    """Add or replace tensors in model.safetensors. None removes a tensor. ``__`` in a name stands for a dot."""
    held = load_file(directory / "model.safetensors")
    held |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in held.items() if v is not None}, directory / "model.safetensors", {"format": "pt"})


def problems(directory) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_tensors(CheckpointFiles(directory), read_architecture(directory))
    prefix = f"model.path={directory}: "
    assert all(line.startswith(prefix) for line in caught.value.problems)
    return [line.removeprefix(prefix) for line in caught.value.problems]


@pytest.mark.parametrize("sharded", [False, True])
def test_valid_checkpoint_passes_and_reads_slices(sharded, copy):
    directory = copy(sharded=sharded)
    files = CheckpointFiles(directory)
    check_tensors(files, read_architecture(directory))
    one, two = files.slices(["model.embed_tokens.weight", "lm_head.weight"])
    expected = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
    assert torch.equal(one[5:9, 3:7], expected["model.embed_tokens.weight"][5:9, 3:7])
    assert torch.equal(two[500:515], expected["lm_head.weight"][500:515])
    assert files.dtype("model.norm.weight") == torch.float32


def test_missing_tensor_is_named_with_its_parameter(copy):
    directory = copy()
    change(directory, model__layers__3__self_attn__k_proj__weight=None)
    assert problems(directory) == [
        "tensor model.layers.3.self_attn.k_proj.weight is missing (for parameter "
        "decoder.layers.{l}.self_attention.linear_qkv.weight); download the checkpoint again, or correct config.json"
    ]


def test_extra_tensor_is_refused_except_known_derived_ones(copy):
    directory = copy()
    change(directory, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    change(directory, transformer__h__0__attn__masked_bias=torch.ones(1), h__0__attention__bias=torch.ones(1, 1, 4, 4))
    check_tensors(CheckpointFiles(directory), read_architecture(directory))
    change(directory, score__weight=torch.zeros(1, 64))
    assert problems(directory) == [
        "tensor score.weight in model.safetensors is not used by a llama model with this config.json; "
        "correct config.json, or remove the tensor"
    ]


def test_wrong_shapes_and_dtypes_are_refused(copy):
    directory = copy()
    change(directory, lm_head__weight=torch.zeros(512, 64), model__norm__weight=torch.zeros(64, dtype=torch.int8))
    assert problems(directory) == [
        "tensor lm_head.weight in model.safetensors has shape [512, 64], expected [515, 64]; config.json or the file "
        "belongs to another model; download both again",
        "tensor model.norm.weight in model.safetensors has dtype I8; convert it to bf16, fp16 or fp32",
    ]


def test_many_problems_of_one_kind_are_summarized(copy):
    directory = copy()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    lines = problems(directory)
    assert len(lines) == 5 and lines[-1] == "and 5 more like the last one"


def test_tied_copy_is_accepted_if_equal(copy):
    directory = copy(tie_word_embeddings=True)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change(directory, lm_head__weight=embedding.clone())
    check_tensors(CheckpointFiles(directory), read_architecture(directory))
    different = embedding.clone()
    different[514, 63] += 1
    for other in (different, embedding[:10].clone(), embedding.bfloat16()):
        change(directory, lm_head__weight=other)
        assert problems(directory) == [
            "tensor lm_head.weight in model.safetensors differs from model.embed_tokens.weight although config.json "
            "ties them; set tie_word_embeddings to false in config.json, or remove the tensor"
        ]


def edit_index(directory, edit):
    path = directory / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard_is_named(copy):
    directory = copy(sharded=True)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    assert problems(directory) == [f"{INDEX} lists {shard.name}, which is missing; download the checkpoint again"]


def test_index_that_does_not_match_its_files_is_refused(copy):
    directory = copy(sharded=True)
    first = sorted(directory.glob("*.safetensors"))[0].name
    edit_index(directory, lambda places: places.update({"model.norm.weight": first, "ghost": first}))
    lines = problems(directory)
    assert lines == [
        f"{INDEX} lists tensor {name} in {first}, which does not contain it; download the checkpoint again"
        for name in ("model.norm.weight", "ghost")
    ]
    with pytest.raises(ConfigError, match=f"{INDEX} does not match the files"):
        CheckpointFiles(directory).slices(["ghost"])
    with pytest.raises(ConfigError, match="tensor nobody is missing"):
        CheckpointFiles(directory).slices(["nobody"])


def test_tensor_missing_from_the_index_is_found(copy):
    directory = copy(sharded=True)
    shard = sorted(directory.glob("*.safetensors"))[0]
    save_file({**load_file(shard), "stray": torch.zeros(2)}, shard)
    assert problems(directory) == [
        f"tensor stray in {shard.name} is not used by a llama model with this config.json; correct "
        "config.json, or remove the tensor"
    ]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ".safetensors"])
def test_index_entries_must_be_local_safetensors_names(name, copy):
    directory = copy(sharded=True)
    edit_index(directory, lambda places: places.update({"model.norm.weight": name}))
    assert problems(directory) == [
        f"{INDEX} lists {name!r}, not a safetensors file in this directory; download the checkpoint again"
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", " (invalid JSON at column 2: the text ends inside a value; is it truncated?)"),
        ("{} {}", " (invalid JSON at column 4: there is more text after the end of the value)"),
        ("[]", " (is a list, not an object)"),
        ("{}", ": weight_map is missing or invalid"),
        ('{"weight_map": []}', ": weight_map is missing or invalid"),
        ('{"weight_map": 3}', ": weight_map is missing or invalid"),
        ("[" * 100_000, " (is nested deeper than 64 levels)"),
    ],
)
def test_unreadable_index_is_refused(text, says, copy):
    directory = copy(sharded=True)
    (directory / INDEX).write_text(text)
    assert problems(directory) == [f"{INDEX} cannot be read{says}; download it again"]


def test_stale_single_file_next_to_an_index_is_refused(copy):
    directory = copy(sharded=True)
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    assert problems(directory) == [
        f"has model.safetensors and also {INDEX}, but the index does not list model.safetensors; remove the one that "
        "is out of date"
    ]


def test_pickled_weights_are_refused(copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    assert problems(directory) == [
        f"has neither model.safetensors nor {INDEX}; set it to the directory of a Hugging Face checkpoint"
    ]
    torch.save({}, directory / "pytorch_model.bin")
    [line] = problems(directory)
    assert line.startswith(
        "pytorch_model.bin: pickled weights are refused, because loading them can run code; if you trust them, convert"
    )


HEADER = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "cannot be read"),
        (b"not a safetensors file at all", "is damaged"),
        ((1 << 60).to_bytes(8, "little") + HEADER, "is damaged"),
        (len(HEADER).to_bytes(8, "little") + HEADER, "cannot be read"),
        (len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[4]", b"[1000000]") + bytes(16), "cannot be read"),
    ],
    ids=["empty", "text", "header bomb", "cut short", "shape lies"],
)
def test_damaged_file_is_named(content, says, copy):
    directory = copy()
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model\.safetensors {says} \(.*\); download it again"):
        CheckpointFiles(directory)


def test_fifo_is_not_accepted_as_a_file(copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    assert problems(directory)[0].startswith("has neither")
