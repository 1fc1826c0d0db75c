"""Let whole programs run on the null GPU. With this folder on PYTHONPATH, Python imports this file at startup.

The null GPU runs no kernels, so numbers on the device are arbitrary. This file replaces everything that could stop a
program because of an arbitrary number: the numbers that control a step (lone_rank.py), checks of values, and
comparisons of results. For the same reason, the file of evaluated pairs is not written. Everything else is as on a
GPU: each program's arguments, imports, allocations, launches, compilation, other files and exit codes.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def engine(module: ModuleType) -> None:
    import torch

    from lone_rank import replace_numbers

    if torch.cuda.is_available():
        replace_numbers(weights=True)


def trainer(module: ModuleType) -> None:
    module.require_first_step = module.require_finite = nothing


def results(module: ModuleType) -> None:
    module._write_pairs = lambda *rest: "not written"  # the original would select rows by a mask of arbitrary numbers


def torch(module: ModuleType) -> None:
    norm, equal, finite = module.Tensor.norm, module.equal, module.isfinite
    module.Tensor.norm = lambda self, *rest, **named: (
        module.zeros(()) if self.is_cuda and not self.requires_grad else norm(self, *rest, **named)
    )
    module.isfinite = module.Tensor.isfinite = lambda self: (
        module.ones(self.shape, dtype=module.bool) if self.is_cuda else finite(self)
    )
    module.equal = lambda one, other: one.is_cuda or other.is_cuda or equal(one, other)


def comparison(module: ModuleType) -> None:
    module.assert_close = nothing


def pytest(module: ModuleType) -> None:
    module.approx = lambda *rest, **named: Anything()


def contest(module: ModuleType) -> None:
    module.check_agreement = lambda *rest: 0.0


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "torch": torch,
    "torch.testing": comparison,
    "pytest": pytest,
    "contest": contest,
    "dpo_engine.training.engine": engine,
    "dpo_engine.training.trainer": trainer,
    "dpo_engine.training.results": results,
}


class Anything:
    """An object that equals every value."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


def nothing(*rest: Any, **named: Any) -> None:
    pass


class Changing(importlib.abc.MetaPathFinder):
    """An import hook that applies `CHANGES` to a module after the module's first import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)  # so that the call of find_spec below uses the other finders
        try:
            spec = importlib.util.find_spec(name)
        finally:
            CHANGES[name] = change  # a program can find a module without importing it, and import it later
        execute = spec.loader.exec_module

        def changed(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Changing())
