"""Tests of exports: an export is atomic, copies only intended files, and replaces only files that an export wrote."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.model.weights.export import Export, companions, config_text, sealed
from dpo_engine.model.weights.shard_files import ShardWriter


@pytest.fixture
def source(tmp_path):
    """Write the small files of a checkpoint, and some files that must not be exported."""
    directory = tmp_path / "source"
    directory.mkdir()
    config = {"model_type": "llama", "dtype": "bfloat16", "auto_map": {"AutoModel": "evil.Model"}, "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "modeling_evil.py", "notes.txt"):
        (directory / name).write_text(name)
    return directory


def export_once(directory, source, value=1.0, limit=1 << 20):
    export = Export(directory)
    export.open(source)
    writer = ShardWriter(export.staging, "stage-00000", limit)
    for name in ("b", "a"):
        writer.add(name, torch.full((4, 4), value))
    export.publish([writer.finish()], {**companions(source, None), "config.json": config_text(source, None).encode()})


def test_export_has_weights_and_tokenizer_but_no_code(source, tmp_path):
    export_once(tmp_path / "out" / "hf", source)
    hf = tmp_path / "out" / "hf"
    assert sorted(path.name for path in hf.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert json.loads((hf / "config.json").read_text()) == {
        "model_type": "llama",
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
    }
    assert os.listdir(tmp_path / "out") == ["hf"]


def test_second_export_replaces_the_first(source, tmp_path):
    target = tmp_path / "hf"
    export_once(target, source, 1.0, limit=64)
    assert len(list(target.glob("model-*"))) == 2
    export_once(target, source, 2.0)
    assert load_file(target / "model.safetensors")["a"][0, 0] == 2.0
    assert not list(target.glob("model-*")) and not list(tmp_path.glob(".hf*"))


def test_directory_with_other_files_is_never_replaced(source, tmp_path):
    target = tmp_path / "hf"
    target.mkdir()
    export_once(target, source)
    for name in ("thesis.tex", "model-00001-of-00002.safetensors", "tokenizer"):
        path = target / name
        if name.endswith(".safetensors"):
            save_file({"x": torch.zeros(1)}, path, {"format": "pt"})
        elif name == "tokenizer":
            path.mkdir()
        else:
            path.write_text("years of work")
        with pytest.raises(CheckpointError) as caught:
            Export(target).open(source)
        expected = f"is occupied by {name}, which was not written by an export; choose another directory for the export"
        assert str(caught.value) == f"{target}: {expected}"
        assert path.exists()
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: is occupied by a regular file"):
        Export(tmp_path / "file").open(source)
    with pytest.raises(CheckpointError, match="source: is model.path itself; choose another directory"):
        Export(source).open(source)
    with pytest.raises(CheckpointError, match="start: is adapter.path itself; choose another directory"):
        Export(tmp_path / "start").open(source, tmp_path / "start")


@pytest.mark.parametrize("moment", ["while writing", "between the renames", "before clearing up"])
def test_leftovers_of_a_killed_export_do_not_block_the_next(moment, source, tmp_path):
    target = tmp_path / "hf"
    export_once(target, source, 1.0)
    export = Export(target)
    if moment == "while writing":
        export.open(source)
        (export.staging / "stage-00000-00000.safetensors").write_bytes(b"half")
    elif moment == "between the renames":
        export.open(source)
        os.rename(target, export.replaced)
        Export(target).open(source)
        assert load_file(target / "model.safetensors")["a"][0, 0] == 1.0, "the old export must have been restored"
    else:
        export.replaced.mkdir()
    export_once(target, source, 2.0)
    assert load_file(target / "model.safetensors")["a"][0, 0] == 2.0
    assert not list(tmp_path.glob(".hf*"))


def test_links_out_of_the_checkpoint_are_not_followed(source, tmp_path):
    (tmp_path / "private").write_text("secret")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "private")
    with pytest.raises(ConfigError) as caught:
        companions(source, None)
    expected = (
        f"model.path={source}: tokenizer.json links to a file outside that directory; replace the link with a copy"
    )
    assert str(caught.value) == expected
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("tokenizer.model")
    assert companions(source, None)["tokenizer.json"] == source / "tokenizer.model"
    (source / "config.json").rename(tmp_path / "config.json")
    (source / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="config.json links to a file outside that directory"):
        config_text(source, None)


def test_links_of_a_hugging_face_cache_are_followed(source, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    export_once(tmp_path / "hf", snapshot)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (tmp_path / "hf" / "tokenizer.json").is_symlink()


def test_non_regular_files_are_refused(source):
    (source / "vocab.json").mkdir()
    with pytest.raises(ConfigError, match="vocab.json is not a regular file; replace it with a regular file"):
        companions(source, None)
    (source / "vocab.json").rmdir()
    (source / "vocab.json").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="vocab.json is not a regular file"):
        companions(source, None)


def test_other_tokenizer_replaces_that_of_the_source(source, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "vocab.json").write_text("theirs")
    (other / "generation_config.json").write_text("theirs")
    found = companions(source, other)
    assert found == {"generation_config.json": source / "generation_config.json", "vocab.json": other / "vocab.json"}
    (other / "bpe.model").write_text("a sentencepiece model")
    found = companions(source, str(other / "bpe.model"))
    assert found == {
        "generation_config.json": source / "generation_config.json",
        "tokenizer.model": other / "bpe.model",
    }


def test_config_has_the_requested_dtype(source):
    assert json.loads(config_text(source, torch.float32))["dtype"] == "float32"
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert json.loads(config_text(source, torch.bfloat16)) == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert json.loads(config_text(source, None)) == {"model_type": "llama"}


def test_writer_holds_one_file_at_a_time(tmp_path):
    writer = ShardWriter(tmp_path, "stage-00001", max_bytes=100)
    for number in range(5):
        writer.add(f"t{number}", torch.zeros(10))
        writer.flush()
        assert len(list(tmp_path.iterdir())) == number // 2
    share = writer.finish()
    expected = {f"t{number}": f"stage-00001-{number // 2:05d}.safetensors" for number in range(5)}
    assert share.files == expected and share.num_bytes == 200
    writer = ShardWriter(tmp_path / "elsewhere", "s", 100)
    writer.add("x", torch.zeros(1))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: this node cannot see the export directory made by rank 0"):
        writer.finish()


def test_two_exports_are_equal_byte_by_byte(source, tmp_path):
    contents = set()
    for number in range(12):
        export_once(tmp_path / f"hf{number}", source)
        contents.add((tmp_path / f"hf{number}" / "model.safetensors").read_bytes())
    assert len(contents) == 1
    assert b'"__metadata__":{"format":"pt","writer":"dpo-engine"}' in contents.pop()
    assert load_file(tmp_path / "hf0" / "model.safetensors")["a"].shape == (4, 4)


def test_edited_model_card_is_never_replaced(source, tmp_path):
    target = tmp_path / "hf"
    export_once(target, source)
    named = target / "additional_chat_templates"
    named.mkdir()
    (named / "rag.jinja").write_text("{{ 1 }}")
    (target / "README.md").write_text(sealed("# a model\n"))
    assert Export(target).refusal(source) is None
    for text in (
        "# a model\n",
        sealed("# a model\n") + "my notes\n",
        sealed("# a model\n").replace("a", "b"),
        "\udcff",
    ):
        (target / "README.md").write_text(text, errors="surrogateescape")
        assert Export(target).refusal(source) == "is occupied by README.md, which was not written by an export"
    (target / "README.md").unlink()
    (named / "notes.txt").write_text("years of work")
    assert (
        Export(target).refusal(source) == "is occupied by additional_chat_templates, which was not written by an export"
    )
