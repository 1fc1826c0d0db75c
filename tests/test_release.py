"""Tests of a release.

No file mentions a particular machine or package index. The constraints pin the requirements of the package and of its
extras, except for the extra ``gpu``. Wheels contain every file of the package.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parent.parent


def tracked() -> list[Path]:
    """Return the files that git tracks, and new files that git does not ignore. Skip the test outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_name_no_machine_and_no_package_index():
    # The test also searches this file, so each pattern is written in such a way that it does not match itself.
    index = re.compile(r"--(extra-)?index[-]url|find[-]links|\w\.[a-z]{2,}(:\d+)?/(\S*/)?(simpl[e]|wh[l])\b|\.wh[l]\b")
    place = re.compile(r"(?<![\w.$}~])/(home|root|work|mnt|Users|scratch)/")
    for path in tracked():
        if path.suffix == ".png":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not index.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            assert not place.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def requirements(text: list[str]) -> set[str]:
    """Return the package names in requirement lines, except the project's own name.

    The project's own name occurs where one extra includes another.
    """
    return {re.match(r"[A-Za-z0-9-]+", line)[0] for line in text} - {"dpo-engine"}


def test_constraints_pin_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = requirements(project["dependencies"])
    assert {"torch", "megatron-core", "transformers"} <= required and not {"tensorboard", "matplotlib"} & required
    for name in extras.keys() - {"gpu"}:  # NVIDIA's PyTorch image contains the packages of the extra gpu
        required |= requirements(extras[name])
    for path in sorted((ROOT / "constraints").glob("*.txt")):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+(; python_version [<>=]+ \"3\.\d+\")?", line) for line in lines)
        assert required <= {line.split("==")[0] for line in lines}, path.name


def test_wheels_contain_all_files_of_the_package():
    """setuptools adds Python files by itself, but other files only if pyproject.toml names them."""
    package = ROOT / "dpo_engine"
    others = [path.relative_to(package) for path in tracked() if package in path.parents and path.suffix != ".py"]
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dpo_engine"]
    assert others and not [str(path) for path in others if not any(path.match(pattern) for pattern in named)]
