"""Imports only go down, and Megatron and the kernels are imported only where they may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpo_engine"

FLOORS = [
    {
        "errors",
        "config",
        "config_sections",
        "config_errors",
        "run_file",
        "registry",
        "durable",
        "faults",
        "strict_json",
        "exit_code",
    },
    {"objective", "platform", "model.architecture"},
    {
        "data",
        "evaluation",
        "training.metrics",
        "training.sinks",
        "training.interruption",
        "training.bad_steps",
        "model.families",
    },
    {"model", "scoring.logps", "scoring.store"},
    {
        "scoring.reference",
        "training.identity",
        "training.optimizer",
        "training.optimizer_state",
        "training.rank_guard",
        "training.checkpoint",
        "training.checkpoint_directory",
        "training.checkpoint_shards",
        "training.saver",
    },
    {"training.step", "training.evaluate"},
    {
        "training.engine",
        "training.micro_batches",
        "training.reference_modes",
        "training.store_filling",
        "training.first_step",
        "training.fitness",
        "training.run_data",
        "training.held_out",
        "training.resumption",
        "training.export",
        "training.trainer",
        "training.parity",
        "check",
        "config_rules",
        "estimate",
        "summary",
    },
    {"cli", "rehearsal", "__main__"},
]
MEGATRON = {
    "platform",
    "model",
    "training.step",
    "training.optimizer",
    "training.optimizer_state",
}
KERNELS = {"scoring.logps", "model.attention"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def listed(module: str, names: set[str]) -> bool:
    """Whether ``module`` or a package it lies in is one of ``names``."""
    return any(module == name or module.startswith(name + ".") for name in names)


def floor(module: str) -> int:
    """The floor of ``module``: that of the longest listed name it lies under."""
    found = [(len(name), level) for level, names in enumerate(FLOORS) for name in names if listed(module, {name})]
    return max(found)[1] if found else -1


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports anywhere, function bodies included; ``from x import y`` gives ``x.y`` too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    if MODULES[module].read_text().strip() == "":
        return
    level = floor(module)
    assert level >= 0 or module in {"data", "model", "scoring", "training"}, f"{module} stands on no floor"
    below = {name.removeprefix("dpo_engine.") for name in imports(MODULES[module]) if name.startswith("dpo_engine.")}
    up = {name: floor(name) for name in below if name in MODULES and floor(name) > level}
    assert not up, f"{module} (floor {level}) imports upward: {up}"


@pytest.mark.parametrize("module", MODULES)
def test_megatron_and_kernels_stay_where_they_belong(module):
    found = imports(MODULES[module])
    if not listed(module, MEGATRON):
        assert not {name for name in found if name.split(".")[0] == "megatron"}
    if not listed(module, KERNELS):
        assert not {name for name in found if name.split(".")[0] == "dpo_kernels"}


def test_kernels_know_nothing_of_the_engine():
    for path in (PACKAGE.parent / "kernels" / "dpo_kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"dpo_engine", "megatron", "transformers"}, path
