"""The base class of all sections of a run's configuration, and types for their keys."""

from __future__ import annotations

import re
from fractions import Fraction as Exact
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)epoch")


def interval_of(value: int | str) -> int | Exact:
    """Return an :data:`Interval` as a number of steps (`int`) or of epochs (`Exact`, such as 1/4 for 0.25epoch)."""
    return value if isinstance(value, int) else Exact(_EPOCHS.fullmatch(value)[1])


def _interval(value: Any) -> Any:
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    part = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
    if not steps and not (part and Exact(part[1])):
        raise ValueError("a number of steps, or a number of epochs such as 0.25epoch")
    return value


Interval = Annotated[int | str, BeforeValidator(_interval)]
"""A number of steps, or a number of epochs such as ``0.25epoch`` or ``1epoch``."""


class Section(BaseModel):
    """A section of the configuration. Types are strict ("2" is not accepted for 2), unknown keys are errors, and the
    loaded section is read-only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
