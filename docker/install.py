"""Install the engine into the image's virtual environment, with package versions from the base image or `constraints/`.

Usage, from the repository root, with the environment's interpreter: ``python docker/install.py``. Arguments come from
the environment: TORCH_REQUIREMENT, CONSTRAINTS, EXTRAS, PIP_OPTIONS (see docker/Dockerfile), and the image's
PIP_CONSTRAINT.

The problem: NVIDIA's images contain packages that must not change, because torch, Transformer Engine and Apex are
compiled against them. The images also set PIP_CONSTRAINT to a file with the versions of all packages in the image. pip
stops if two constraints for one package differ, and a build without constraints can install different versions every
day.

The solution is one list of constraints with one line per package: the base image's version if the image has the
package, otherwise the tested version. If pyproject.toml does not allow the base image's version, the tested version
replaces it, except for torch. If pip finds the list contradictory, this script tries a second list, which keeps the
base image's version only for packages that are compiled against torch or have no tested version. The build prints the
replaced versions, and image.txt names the list that was used.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

try:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:  # not installed yet; pip has a copy
    from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

COMPILED = re.compile(r"(torch|torchvision|torchaudio|torchao|triton|pytorch-triton|numpy|apex|flash-attn.*)$")
COMPILED_PREFIXES = ("nvidia-", "cuda-", "transformer-engine")
OWN = {"pip", "setuptools", "wheel", "dpo-engine"}


def compiled(name: str) -> bool:
    """Whether a package is torch, numpy or a CUDA library, or may be compiled against these."""
    return bool(COMPILED.match(name)) or name.startswith(COMPILED_PREFIXES)


def parse(lines: list[str]) -> dict[str, Requirement]:
    """Return the requirements in ``lines`` that apply to this Python, keyed by normalized name."""
    found = {}
    for line in lines:
        try:
            requirement = Requirement(line.split(" #")[0].split(" --hash")[0].strip())
        except InvalidRequirement:  # a comment, an option, or a version that Debian has changed
            continue
        if requirement.url is None and (requirement.marker is None or requirement.marker.evaluate()):
            found[canonicalize_name(requirement.name)] = requirement
    return found


def of_base_image(constraint_files: list[str]) -> dict[str, Requirement]:
    """Return the installed packages with their versions, and other packages that the given constraints files name."""
    installed = [f"{one.metadata['Name']}=={one.version}" for one in distributions() if one.metadata["Name"]]
    lines = [line for file in constraint_files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    return {**parse(lines), **parse(installed)}


def allowed(requirement: Requirement, bounds: SpecifierSet) -> bool:
    """Whether the pinned version of a requirement is within bounds; true if the requirement pins no version."""
    pins = [part.version for part in requirement.specifier if part.operator == "==" and "*" not in part.version]
    return all(bounds.contains(Version(pin), prereleases=True) for pin in pins)


def combine(
    tested: dict[str, Requirement], base: dict[str, Requirement], bounds: dict[str, SpecifierSet], only_compiled: bool
) -> tuple[list[str], list[str]]:
    """Return the lines of the combined constraints, and a line for each package whose base-image version is replaced.

    bounds          the versions that pyproject.toml allows, by name
    only_compiled   whether to keep the base image's versions only for packages that are compiled against torch or have
                    no tested version
    """
    kept, replaced = {}, []
    for name, requirement in base.items():
        if name in OWN:
            continue
        fits = name == "torch" or allowed(requirement, bounds.get(name, SpecifierSet()))
        if name in tested and not (fits and (compiled(name) or not only_compiled)):
            replaced.append(f"{requirement} -> {tested[name].specifier}")
        else:
            kept[name] = requirement
    return sorted(map(str, {**tested, **kept}.values())), sorted(replaced)


def choose(folder: Path, torch: str) -> Path:
    """Return a constraints file whose versions were tested with this Python. Prefer a file with this version of torch.

    Only major and minor versions of torch are compared: NVIDIA's images have versions such as 2.11.0a0+HASH.
    """
    fitting = []
    for file in sorted(folder.glob("*.txt")):
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        oldest, newest = re.search(r"Python 3\.(\d+)(?: to 3\.(\d+))?", first).groups()
        if int(oldest) <= sys.version_info[1] <= int(newest or oldest):
            (pin,) = parse(lines)["torch"].specifier
            fitting.append((Version(pin.version).release[:2] == Version(torch).release[:2], file))
    if not fitting:
        sys.exit(f"Python 3.{sys.version_info[1]}: no file in constraints/ is for this version; use another BASE_IMAGE")
    return next((file for same, file in fitting if same), fitting[0][1])


def torch_version() -> str | None:
    """Return the version of the installed torch, or None.

    A new process looks up the version, because this process may not find a torch that was just installed.
    """
    command = [sys.executable, "-c", "from importlib.metadata import version; print(version('torch'))"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def pip(*arguments: str) -> str:
    """Run ``pip install``. Return pip's error messages, or "" if pip succeeds.

    PIP_CONSTRAINT is not passed on, because this script's own list of constraints replaces it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    options = os.environ.get("PIP_OPTIONS", "").split()
    command = [sys.executable, "-m", "pip", "install", *options, *arguments]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    return done.stderr or "failed" if done.returncode else ""


def write(path: str, lines: list[str]) -> None:
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    asked, torch = os.environ.get("TORCH_REQUIREMENT", ""), torch_version()
    if not asked and torch is None:
        sys.exit("TORCH_REQUIREMENT: the base image has no torch; set this variable, for example to torch==2.13.0")
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {name: one.specifier for name, one in parse(project["dependencies"]).items()}
    wanted = Requirement(asked).specifier if asked else SpecifierSet(f"=={torch}")
    pinned = next((part.version for part in wanted if part.operator == "=="), torch or "0")
    chosen = os.environ.get("CONSTRAINTS") or str(choose(Path("constraints"), pinned))
    tested = parse(Path(chosen).read_text(encoding="utf-8").splitlines())
    if Version(pinned).release != Version(next(iter(tested["torch"].specifier)).version).release:
        del tested["triton"]  # each release of torch needs a certain version of triton
    del tested["torch"]
    base = of_base_image(os.environ.get("PIP_CONSTRAINT", "").split())
    if asked:
        base.pop("torch", None)
        write("/opt/constraints.txt", combine(tested, base, bounds, only_compiled=False)[0])
        if pip("-c", "/opt/constraints.txt", asked):
            sys.exit(1)
        torch = torch_version()
    base["torch"] = Requirement(f"torch=={torch}")
    if not allowed(base["torch"], bounds["torch"]):
        sys.exit(f"torch {torch}: the engine requires torch{bounds['torch']}; use another BASE_IMAGE")
    for only_compiled in (False, True):
        lines, replaced = combine(tested, base, bounds, only_compiled)
        for line in replaced:
            sys.stdout.write(f"replaced in /opt/venv: {line}\n")
        kept = (
            "those that are compiled against torch or have no tested version"
            if only_compiled
            else "all that pyproject.toml allows"
        )
        write("/opt/constraints.txt", [f"# {chosen}; packages kept from the base image: {kept}", *lines])
        problem = pip("-c", "/opt/constraints.txt", f".[{os.environ.get('EXTRAS', '')}]")
        if not problem:
            return
        if only_compiled or "ResolutionImpossible" not in problem:
            sys.exit(1)
        sys.stdout.write(
            "the engine's requirements contradict the base image's versions; retrying with fewer of these versions\n"
        )


if __name__ == "__main__":
    main()
