"""dpo-engine: preference optimization on NVIDIA Megatron-Core, with the same loss in every parallel layout.

The names in ``__all__`` are the Python interface. Each name is imported when it is first used, so importing the package
requires neither torch nor Megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpo_engine.version import __version__ as __version__

if TYPE_CHECKING:
    from dpo_engine.config.run import Config
    from dpo_engine.data.formats import FORMATS
    from dpo_engine.errors import EngineError
    from dpo_engine.model.activations import ACTIVATIONS
    from dpo_engine.model.architecture import FAMILIES
    from dpo_engine.model.norms import NORMS
    from dpo_engine.objective.losses import LOSSES
    from dpo_engine.optim.optimizers import OPTIMIZERS
    from dpo_engine.optim.schedules import SCHEDULES
    from dpo_engine.reporting.sinks import SINKS
    from dpo_engine.training.callbacks import CALLBACKS, Callback
    from dpo_engine.verbs.check import check
    from dpo_engine.verbs.compare import compare
    from dpo_engine.verbs.evaluate import evaluate
    from dpo_engine.verbs.export import export
    from dpo_engine.verbs.fetch import fetch
    from dpo_engine.verbs.inspect import inspect
    from dpo_engine.verbs.parity import parity
    from dpo_engine.verbs.plan import plan
    from dpo_engine.verbs.reference import score_reference
    from dpo_engine.verbs.rehearse import rehearse
    from dpo_engine.verbs.report import report
    from dpo_engine.verbs.tokenize import tokenize
    from dpo_engine.verbs.train import train

__all__ = [
    "ACTIVATIONS",
    "CALLBACKS",
    "FAMILIES",
    "FORMATS",
    "LOSSES",
    "NORMS",
    "OPTIMIZERS",
    "SCHEDULES",
    "SINKS",
    "Callback",
    "Config",
    "EngineError",
    "check",
    "compare",
    "evaluate",
    "export",
    "fetch",
    "inspect",
    "parity",
    "plan",
    "rehearse",
    "report",
    "score_reference",
    "tokenize",
    "train",
]

_PLACES = {
    "ACTIVATIONS": "model.activations",
    "CALLBACKS": "training.callbacks",
    "Callback": "training.callbacks",
    "Config": "config.run",
    "EngineError": "errors",
    "FAMILIES": "model.architecture",
    "FORMATS": "data.formats",
    "LOSSES": "objective.losses",
    "NORMS": "model.norms",
    "OPTIMIZERS": "optim.optimizers",
    "SCHEDULES": "optim.schedules",
    "SINKS": "reporting.sinks",
    "score_reference": "verbs.reference",
}
"""The module of each name that is not defined in ``verbs/NAME.py``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES.get(name, f'verbs.{name}')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
