"""Tests of imports and of file lengths.

A wing is a folder or a group of modules outside folders. ``TOWER`` lists the wings from lowest to highest. A wing
imports only from itself and from lower wings. Only the wings and modules in ``MEGATRON`` may import Megatron, and only
those in ``KERNELS`` may import the kernels.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpo_engine"

TOWER = (
    "root",
    "platform",
    "objective",
    "config",
    "reporting",
    "data",
    "batching",
    "model",
    "scoring",
    "optim",
    "checkpoint",
    "training",
    "verbs",
    "testing",
    "cli",
)
"""Wings from lowest to highest. `root` and `cli` consist of modules outside folders; all other wings are folders."""

ROOT = {
    "__init__",
    "atomic_files",
    "errors",
    "exit_code",
    "faults",
    "installation",
    "migration",
    "options",
    "registry",
    "strict_json",
    "version",
    "wording",
}
MEGATRON = {"platform", "model", "optim", "training.step"}
KERNELS = {
    "batching.batches",
    "scoring.logps",
    "scoring.reference",
    "model.attention",
    "model.attention_packages",
    "model.kernels",
    "model.latent",
    "model.layer",
    "model.norms",
    "model.local_experts",
}
LONGEST_FILE = 350

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def wing(module: str) -> str:
    """Return the wing that contains ``module``, a dotted name without the package's name."""
    top = module.partition(".")[0]
    return "root" if top in ROOT else "cli" if top == "__main__" else top


def imports(path: Path) -> set[str]:
    """Return all dotted names that a file imports, even in functions. ``from x import y`` gives ``x`` and ``x.y``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(module: str) -> set[str]:
    """Return the modules of this package that ``module`` imports."""
    names = {name.removeprefix("dpo_engine.") for name in imports(MODULES[module]) if name.startswith("dpo_engine.")}
    return ({name if name in MODULES else f"{name}.__init__" for name in names} & set(MODULES)) - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert wing(module) in TOWER, f"{module} belongs to none of the wings {', '.join(TOWER)}"
    level = TOWER.index(wing(module))
    up = {name for name in own_imports(module) if TOWER.index(wing(name)) > level}
    assert not up, f"{module} ({wing(module)}) imports upward: {up}"


def test_only_tests_and_plugins_import_the_checks_of_families():
    for module in MODULES:
        found = {wing(name) for name in own_imports(module)}
        assert "testing" not in found or wing(module) == "testing", module


def test_imports_have_no_cycles():
    def reach(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"import cycle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for name in sorted(own_imports(module)):
                reach(name, (*way, module))
            done.add(module)

    done: set[str] = set()
    for module in MODULES:
        reach(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_megatron_and_kernels_are_imported_only_where_allowed(module):
    found = {name.split(".")[0] for name in imports(MODULES[module])}

    def allowed(places: set[str]) -> bool:
        return any(module == place or module.startswith(f"{place}.") for place in places)

    assert "megatron" not in found or allowed(MEGATRON)
    assert "dpo_kernels" not in found or allowed(KERNELS)


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines, but a file may have at most {LONGEST_FILE}; split it"


def test_kernels_do_not_import_the_engine():
    for path in (PACKAGE.parent / "kernels" / "dpo_kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"dpo_engine", "megatron", "transformers"}, path
