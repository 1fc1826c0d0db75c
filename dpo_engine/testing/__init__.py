"""Checks that a plugin's author can run on a model family; see "Test the family" in ``docs/extending.md``.

The engine's own tests use the same functions. The functions need transformers and Megatron-Core, but neither a GPU nor
a test framework. Modules of the engine outside ``dpo_engine.testing`` do not import it.
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
