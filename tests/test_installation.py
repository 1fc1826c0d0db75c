"""Tests of an installation.

The installation check refuses kernels of another installation or version. ``launch/environment.sh`` keeps an activated
environment. Users without a name or a home folder can compile kernels. Libraries are imported without garbage
collection.
"""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_kernels.version
from dpo_engine import cli, installation
from dpo_engine.errors import ConfigError, shorten
from dpo_engine.version import __version__

ROOT = Path(__file__).parent.parent


def test_kernels_have_the_version_of_the_engine():
    assert dpo_kernels.version.__version__ == __version__


def kernels_at(folder: Path, version: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the check must not import the kernels')\n")
    if version:
        (folder / "version.py").write_text(f'"""The version."""\n\n__version__ = "{version}"\n')
    return folder


def test_activated_environment_is_kept(tmp_path):
    """``launch/environment.sh`` does not rebuild an environment that is activated.

    The interpreter of an activated environment comes first on PATH. If the script took this interpreter as the base
    interpreter, the script would rebuild the environment, and thereby delete the interpreter. Instead, the script must
    take the interpreter from which the environment was created.
    """
    venv = tmp_path / "venv"
    base = Path(sys.executable).resolve()
    subprocess.run([base, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "interpreter").write_text(f"{base}\n")
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    script = "source launch/environment.sh"  # it cannot install packages, because this environment has no pip
    subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, "PATH": path, "VENV": venv, "PYTHON": "python3"}
    )
    assert (venv / "bin/python3").exists() and (venv / "interpreter").read_text() == f"{base}\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return the folder that contains a copy of the engine without kernels."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "dpo_engine", folder / "dpo_engine", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def start(here: Path, *command: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
    """Run Python in a folder that contains a copy of the engine."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, *command], cwd=here, env=environment, capture_output=True, text=True)


ENGINE = ("-m", "dpo_engine", "config", "--schema")
CHECK = ("-c", "from dpo_engine.installation import check_installation as check; check()")


def test_engine_of_a_clone_refuses_installed_kernels(copy, tmp_path):
    (copy / "kernels/dpo_kernels").mkdir(parents=True, exist_ok=True)
    other = kernels_at(tmp_path / "site/dpo_kernels", __version__)
    done = start(copy, *ENGINE, path=(tmp_path / "site",))
    shutil.rmtree(copy / "kernels")
    assert (done.returncode, done.stdout) == (2, "")
    expected = (
        f"dpo_kernels: {other} belongs to another installation (the engine is {copy / 'dpo_engine'}, version "
        f"{__version__}); set PYTHONPATH={copy}:{copy / 'kernels'}, or start the installed engine from another "
        "directory"
    )
    assert done.stderr == shorten(expected) + "\n"


def test_engine_refuses_kernels_of_another_version(copy):
    kernels = kernels_at(copy / "dpo_kernels", "0.0.9")
    done = start(copy, *CHECK)
    shutil.rmtree(kernels)
    assert done.stderr.splitlines()[-1] == (
        f"dpo_engine.errors.ConfigError: dpo_kernels: {kernels} has version 0.0.9 (the engine is "
        f"{copy / 'dpo_engine'}, version {__version__}); "
        "install the package again, and remove directories with older files from PYTHONPATH"
    )


def test_kernels_without_a_version_file_have_an_unknown_version(tmp_path):
    assert installation._version(tmp_path / "version.py") == "unknown"


def test_installed_package_is_accepted(copy):
    kernels = kernels_at(copy / "dpo_kernels", __version__)
    done = start(copy, *CHECK)
    shutil.rmtree(kernels)
    assert (done.returncode, done.stderr) == (0, "")


def test_absent_kernels_are_reported(monkeypatch):
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^dpo_kernels: not found \(the engine is .*\); set PYTH"):
        installation.check_installation()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_checks_the_installation(verb, monkeypatch, capsys):
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    words = {"compare": ["a", "b"], "init": ["--model", "m", "--data", "d"], "config": []}.get(verb, ["run.yaml"])
    words = [*words, "--gpus", "1"] if verb == "plan" else words
    assert cli.main([verb, *words]) == 2
    assert capsys.readouterr().err.startswith("dpo_kernels: not found")


def test_nameless_user_without_a_home_can_compile(monkeypatch, tmp_path):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def nameless():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nameless)
    installation.prepare_for_user()
    assert os.environ["USER"] == f"uid{os.getuid()}"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / f"triton_uid{os.getuid()}")
    monkeypatch.delenv("USER")


def test_user_with_a_home_keeps_the_defaults(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "ada")
    before = dict(os.environ)
    installation.prepare_for_user()
    assert dict(os.environ) == before


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_only_while_libraries_are_imported(enabled):
    if not enabled:
        gc.disable()
    frozen = gc.get_freeze_count()
    imported = []
    try:
        with pytest.raises(ImportError), installation.importing():
            assert not gc.isenabled()
            imported = [[] for _ in range(10_000)]
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert gc.get_freeze_count() >= frozen + len(imported) > frozen


WATCH = """
import gc, sys
from dpo_engine import cli

class Watch:  # a finder that finds no module
    enabled = {}
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "megatron"):
            self.enabled[name] = gc.isenabled()

sys.meta_path.insert(0, Watch())
cli._checked(cli._parse(["train", sys.argv[1]]))
assert Watch.enabled == {"torch": False, "transformers": False, "megatron": False}, Watch.enabled
assert gc.isenabled()
"""


@pytest.mark.slow
def test_train_imports_its_libraries_without_garbage_collections(run_yaml):
    subprocess.run([sys.executable, "-c", WATCH, str(run_yaml())], check=True)
