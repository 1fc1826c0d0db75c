"""List every key of a run with its default, its other choices and its meaning, for tables and commented files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from dpo_engine.config.run import Config


@dataclass(frozen=True)
class Key:
    """One key of a run.

    path      dotted path; ``data.train.path`` is a key of each item in the list ``data.train``
    default   default value in YAML, or ``required``
    choices   the other values of the key's ``Literal`` and ``bool`` types; the key may also allow values of other
              types, such as numbers
    meaning   the key's docstring, as one line
    """

    path: str
    default: str
    choices: tuple[str, ...]
    meaning: str


def keys(section: type[BaseModel] = Config, above: str = "") -> Iterator[Key]:
    """Yield every key of a run in schema order. An optional section is yielded as a key, followed by its own keys."""
    for name, field in section.model_fields.items():
        parts = _flat(field.annotation)
        if field.description:
            default = "required" if field.is_required() else as_yaml(_plain(field.default))
            choices = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
            choices += [True, False] if bool in parts else []
            others = tuple(text for text in map(as_yaml, choices) if text != default)
            yield Key(above + name, default, others, " ".join(field.description.split()))
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, f"{above}{name}.")


def as_yaml(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, float) and float(short := format(value, "g")) == value:
        return short
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").rstrip("\n")


def _plain(default: Any) -> Any:
    """Return a default as a YAML value: a tuple becomes a list."""
    return list(default) if isinstance(default, tuple) else default


def _flat(annotation: Any) -> list[Any]:
    """Return an annotation and all its nested arguments, except the values of a ``Literal``."""
    parts = () if get_origin(annotation) is Literal else get_args(annotation)
    return [annotation, *(inner for part in parts for inner in _flat(part))]
