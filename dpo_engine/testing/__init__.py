"""Tests of model families that a plugin's author can run too; see "Test the family" in ``docs/extending.md``.

The tests of the engine use the same functions. They need transformers and Megatron-Core, no GPU, and no test framework.
Nothing else in the package imports this wing.
"""

from dpo_engine.testing.families import (
    FAMILY_CHECKS,
    check_defaults,
    check_export,
    check_layouts,
    check_logits,
    check_steps,
)
from dpo_engine.testing.models import TINY, TinyModels

__all__ = [
    "FAMILY_CHECKS",
    "TINY",
    "TinyModels",
    "check_defaults",
    "check_export",
    "check_layouts",
    "check_logits",
    "check_steps",
]
