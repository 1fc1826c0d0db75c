"""Fault tests: malicious checkpoints, even with valid hashes, cannot harm a run that tries to resume from them."""

import hashlib
import json
import os
import shutil

import pytest
from test_hostile_files import folder, tokenizers, unharmed  # noqa: F401  fixtures

from support.harm import PICKLE, run_alone

directories = pytest.importorskip("dpo_engine.checkpoint.directory")

pytestmark = pytest.mark.slow


@pytest.fixture
def sealed(folder):  # noqa: F811
    """Train, and return a function: ``sealed(change)`` changes the checkpoint and updates the manifest's hash."""
    assert run_alone(["train", "run.yaml"], folder).code == 0
    (checkpoint,) = (folder / "out/checkpoints").glob("step_*")

    def seal(change):
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        manifest = change(manifest, checkpoint) or manifest
        path.write_text(json.dumps({**manifest, "sha256": directories.digest(manifest)}))
        return checkpoint

    return seal


def facts(content: bytes) -> dict:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def place(name):
    """Return an argument for ``sealed``: a function that lists one more file in the manifest.

    The file's name is ``name(checkpoint)``, and its size and hash are those of a pickle. The pickle itself is outside
    of the checkpoint.
    """

    def change(manifest, checkpoint):
        (checkpoint.parent / "outside.safetensors").write_bytes(PICKLE)
        manifest["files"][name(checkpoint)] = facts(PICKLE)

    return change


def replaced(content):
    """Return an argument for ``sealed``: a function that replaces the content of a shard.

    The function also replaces the shard's size and hash in the manifest.
    """

    def change(manifest, checkpoint):
        (name,) = (name for name in manifest["files"] if name.endswith(".safetensors"))
        (checkpoint / name).write_bytes(content)
        manifest["files"][name] = facts(content)

    return change


def linked(manifest, checkpoint):
    (name,) = (name for name in manifest["files"] if name.endswith(".safetensors"))
    shutil.move(checkpoint / name, checkpoint.parent / "elsewhere")
    os.symlink("../elsewhere", checkpoint / name)


def tensors(**entries) -> bytes:
    """Return the bytes of a safetensors file with the tensors ``entries``, all zeros. In names, ``__`` means ``|``."""
    header, at = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name.replace("__", "|")] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def given(**fields):
    return lambda manifest, checkpoint: manifest | fields


CHANGES = {
    "a shard that is a pickle": replaced(PICKLE),
    "a shard without tensors": replaced(tensors()),
    "a shard with incomplete tensor names": replaced(tensors(x=("F32", [4], 16))),
    "a shard with text in place of numbers in tensor names": replaced(tensors(main__decoder__x__y=("F32", [4], 16))),
    "a shard of tensors without dimensions": replaced(tensors(main__decoder__0__0=("F32", [], 4))),
    "a shard with a header bomb": replaced((2**62).to_bytes(8, "little") + b"{}"),
    "a name in the parent directory": place(lambda checkpoint: "../outside.safetensors"),
    "an absolute name": place(lambda checkpoint: str(checkpoint.parent / "outside.safetensors")),
    "the name of a system file": place(lambda checkpoint: "/etc/passwd"),
    "a link": linked,
    "a list of files": given(files=[]),
    "no files": given(files={}),
    "sizes and hashes that are text": lambda manifest, checkpoint: {
        **manifest,
        "files": dict.fromkeys(manifest["files"], "x"),
    },
    "a step that is text": given(step="x"),
    "an identity that is a list": given(identity=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resealed_manifest_is_refused(name, sealed, folder):  # noqa: F811
    sealed(CHANGES[name])
    found = run_alone(["train", "run.yaml"], folder)
    unharmed(found, folder)
    assert found.code == 4 and found.errors and "Traceback" not in found.errors[0], found.errors
    assert found.seconds < 5 and found.grown < 2**28


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PICKLE, id="a pickle"),
        pytest.param(b'{"files": ' + b"[" * 100_000, id="100000 deep"),
        pytest.param(b'{"step": 1' + b"0" * 5000 + b"}", id="an integer of 5001 digits"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'{"format": "\x1b[31m"}', id="a terminal sequence"),
    ],
)
def test_invalid_manifest_is_refused(content, sealed, folder):  # noqa: F811
    checkpoint = sealed(lambda manifest, checkpoint: None)
    (checkpoint / "manifest.json").write_bytes(content)
    found = run_alone(["train", "run.yaml"], folder)
    unharmed(found, folder)
    assert found.code == 4 and found.errors and "Traceback" not in found.errors[0], found.errors


def test_pickles_next_to_the_shards_are_ignored(sealed, folder):  # noqa: F811
    checkpoint = sealed(lambda manifest, checkpoint: None)
    for name in (".metadata", "common.pt", "optimizer.pt", "rng_state.pth"):
        (checkpoint / name).write_bytes(PICKLE)
    found = run_alone(["train", "run.yaml"], folder)
    unharmed(found, folder)
    assert found.code == 0, found.errors
