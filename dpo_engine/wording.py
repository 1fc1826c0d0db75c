"""Formatting of values, types, lists of names, sizes and durations for messages."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def show(value: Any) -> str:
    """Format a value as in YAML, shortened to at most 60 characters."""
    if isinstance(value, str):
        text = value
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(show, value)) + "]"
    else:
        text = str(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 60 else text[:57] + "..."


def join(words: Sequence[Any], last: str = "or") -> str:
    """Join words with commas, but put `last` instead of a comma before the last word: `a, b or c`."""
    shown = [show(word) for word in words]
    return f" {last} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def clock(seconds: float) -> str:
    """Format a duration as `H:MM:SS`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def data_size(size: int) -> str:
    """Format a number of bytes, such as `1.2 GB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} byte{'s' * (size != 1)}"


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the name in `known` that is most similar to `name`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(str(name), known, 1)), None)


def describe(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """Describe in words which values a type annotation allows, such as `null, or a whole number of at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [c for a in arguments[1:] for c in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return describe(arguments[0], [*inner, *constraints])
    if origin in (Union, types.UnionType):
        if bool in arguments:
            return join([True, False, *[word for a in arguments for word in get_args(a)]])
        names_first = sorted(arguments, key=lambda a: a is not type(None) and get_origin(a) is not Literal)
        return ", or ".join(describe(a, constraints) for a in names_first)
    if origin is Literal:
        return join(arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list (each item is {describe(arguments[0])})"
        return f"a list of {len(arguments)} items (each item is {describe(arguments[0])})"
    if origin is list:
        return f"a list (each item is {describe(arguments[0])})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with the keys {join(list(annotation.model_fields), 'and')}"
    if dict in (annotation, origin):
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    text = words.get(annotation, str(annotation))
    limits = " and ".join(_limits(constraints)) if annotation in (int, float) else ""
    return f"{text} of {limits}" if limits.startswith("at ") else f"{text} {limits}".rstrip()


def _limits(constraints: Sequence[Any]) -> Iterator[str]:
    words = (
        (annotated_types.Ge, "ge", "at least"),
        (annotated_types.Gt, "gt", "greater than"),
        (annotated_types.Le, "le", "at most"),
        (annotated_types.Lt, "lt", "less than"),
    )
    for constraint in constraints:
        yield from (f"{word} {getattr(constraint, name)}" for kind, name, word in words if isinstance(constraint, kind))
