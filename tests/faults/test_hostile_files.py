"""Fault tests: hostile files cannot run code, write outside the run's folder, or use much time or memory."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import yaml

from support.harm import CANARY, PICKLE, run_alone
from support.hostile_files import CASES
from support.malformed import ALSO_GOOD, GOOD, dump
from support.tiny_tokenizers import byte_level, piece_model

PACKAGE = Path(__file__).parents[2] / "dpo_engine"
DEFAULT = {
    "record nested 100000 deep",
    "record with a terminal sequence",
    "pickle named safetensors",
    "index that names a link to a pickle outside",
    "tokenizer that is code of its own",
    "template that loops a billion times",
    "run file of a billion laughs",
    "run file that calls the system",
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return byte_level(folder / "tok"), piece_model(folder / "tok.model")


@pytest.fixture
def folder(tiny_hf, tokenizers, tmp_path):
    """Create a valid run in its own folder: `run.yaml`, `pairs.jsonl`, `model`, and two tokenizers."""
    home = tmp_path / "home"
    shutil.copytree(tiny_hf("llama", num_hidden_layers=2), home / "model")
    shutil.copytree(tokenizers[0], home / "tok")
    shutil.copy(tokenizers[1], home / "tok.model")
    (home / "pairs.jsonl").write_bytes(dump(GOOD) + b"\n" + dump(ALSO_GOOD) + b"\n")
    raw = {
        "model": {"path": "model", "tokenizer": "tok.model"},
        "data": {"train": ["pairs.jsonl"], "max_length": 200},
        "train": {"output_dir": "out", "global_batch_size": 2},
        "checkpoint": {"export": False},
        "logging": {"progress": "off", "page": False, "token_samples": 0},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(raw))
    return home


def unharmed(found, folder):
    """Check that no planted code ran, that no file outside `out` changed, and that all output is printable."""
    assert not list(folder.parent.rglob(CANARY)) and not found.changed
    for line in [*found.errors, *found.output.splitlines()]:
        assert line.isprintable(), line


def bytes_of(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in CASES]
)
def test_hostile_file_is_refused_or_harmless_at_low_cost(name, folder):
    case = CASES[name]
    sound = bytes_of(folder)
    overrides = case.plant(folder) or ()
    size = max(0, bytes_of(folder) - sound)
    found = run_alone(["check", "run.yaml", *overrides], folder)
    assert found.code == case.code, (found.errors, found.output)
    unharmed(found, folder)
    if case.code:
        assert len(found.errors) == 1, found.errors
        assert case.says in found.errors[0] and len(found.errors[0]) <= 200, found.errors
    else:
        assert not found.errors and case.says in found.output
    assert found.seconds < 5
    assert found.grown < 2 * size + 200 * 2**20


@pytest.mark.slow
class TestTraining:
    """Training with hostile files in place of the cache, a segment of the reference store, or output files."""

    def train(self, folder, *overrides):
        found = run_alone(["train", "run.yaml", *overrides], folder)
        unharmed(found, folder)
        return found

    def test_pickle_in_place_of_the_cache(self, folder):
        assert self.train(folder).code == 0
        (cache,) = (folder / "out/cache").glob("*.arrow")
        cache.write_bytes(PICKLE)
        found = self.train(folder)
        assert found.code == 0 and "from the cache" not in found.output and cache.read_bytes() != PICKLE

    def test_link_in_place_of_the_cache(self, folder):
        assert self.train(folder).code == 0
        (cache,) = (folder / "out/cache").glob("*.arrow")
        (folder / "precious").write_bytes(b"do not write here")
        cache.unlink()
        cache.symlink_to(folder / "precious")
        found = self.train(folder)
        assert found.code == 0 and not cache.is_symlink()

    @pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "eval"])
    def test_links_in_place_of_output_files(self, name, folder):
        (folder / "out").mkdir()
        (folder / "precious").write_text("do not write here")
        (folder / "out" / name).symlink_to(folder / "precious")
        found = self.train(folder)
        assert found.code in (0, 2), found.errors
        assert (folder / "precious").read_text() == "do not write here"

    def test_pickle_in_place_of_a_store_segment(self, folder):
        import hashlib

        stored = ("reference.mode=stored", "reference.verify=0")
        assert self.train(folder, *stored).code == 0
        (segment,) = (folder / "out/cache/reference").rglob("*.arrow")
        digest = hashlib.sha256(PICKLE).hexdigest()
        segment.unlink()
        planted = segment.with_name(f"00000001-{digest}.arrow")
        planted.write_bytes(PICKLE)
        found = self.train(folder, *stored, "train.output_dir=out", "data.seed=0")
        assert found.code == 0, found.errors
        again = run_alone(["reference", "run.yaml", *stored], folder)
        unharmed(again, folder)
        assert again.code == 0 and "is not a valid Arrow file" in again.output


FORBIDDEN = {
    "imports": {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "tarfile", "zipfile"},
    "calls": {"eval", "exec", "torch.load", "yaml.load", "np.load", "numpy.load", "os.system", "os.popen"},
}


OWN_PIPES = {PACKAGE / name: {"pickle"} for name in ("data/workers.py", "testing/ranks.py")}
"""Modules that may import pickle: they unpickle only data from the engine and from its own child processes."""


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in sorted(PACKAGE.rglob("*.py"))]
)
def test_package_uses_no_unsafe_readers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
            assert not imported & FORBIDDEN["imports"] - OWN_PIPES.get(path, set())
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[0] not in FORBIDDEN["imports"]
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN["calls"], ast.unparse(node)
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                refused = {
                    "weights_only": "False",
                    "trust_remote_code": "True",
                    "allow_pickle": "True",
                    "shell": "True",
                }
                assert refused.get(keyword.arg or "") != value, ast.unparse(node)


def test_vulnerable_library_versions_are_excluded():
    """The required versions do not have the known vulnerabilities to malicious files.

    These are CVE-2025-32434 and CVE-2026-24747 (torch), CVE-2026-4372 (transformers), CVE-2025-27516 (Jinja), and
    CVE-2023-47248 (pyarrow).
    """
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    for needed in ("torch>=2.10.0a0", "transformers>=5.3", "jinja2>=3.1.6", "pyarrow>=14.0.1"):
        assert re.search(f'"{re.escape(needed)}[",]', text), needed
