"""The keys of a run as a list: default, other choices, meaning. Tables and commented files are made from it."""

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

    path      dotted; ``data.train.path`` is a key of each item of the list ``data.train``
    default   its default as it stands in YAML, or ``required``
    choices   other values that it may take, where these can be listed
    meaning   from its docstring
    """

    path: str
    default: str
    choices: tuple[str, ...]
    meaning: str


def keys(section: type[BaseModel] = Config, above: str = "") -> Iterator[Key]:
    """Every key of a run, in the order of the schema. A section itself is no key; an optional one is."""
    for name, field in section.model_fields.items():
        parts = _flat(field.annotation)
        if field.description:
            default = "required" if field.is_required() else as_yaml(_plain(field.default))
            choices = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
            choices += [True, False] if bool in parts else []
            others = tuple(text for text in map(as_yaml, choices) if text != default)
            yield Key(above + name, default, others, field.description)
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, f"{above}{name}.")


def as_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, float) and float(short := format(value, "g")) == value:
        return short
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").rstrip("\n")


def _plain(default: Any) -> Any:
    """A default as values of YAML: tuples are lists."""
    return list(default) if isinstance(default, tuple) else default


def _flat(annotation: Any) -> list[Any]:
    """An annotation and everything it is made of, the values of a ``Literal`` excepted."""
    parts = () if get_origin(annotation) is Literal else get_args(annotation)
    return [annotation, *(inner for part in parts for inner in _flat(part))]
