"""What the schema library reports, as lines of the form `path=value: rule; way out`."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# Keys without a default, in sections that are always there.
REQUIRED = ("model.path", "data.train", "train.output_dir")


@dataclass(frozen=True)
class SchemaProblem:
    path: str
    """dotted, with list indices: data.train[0].weight"""
    keys: tuple[str | int, ...]
    """the same as a way through nested mappings and lists"""
    text: str
    """the line for the user"""


def show(value: Any) -> str:
    """A value as it would be written in YAML, at most some 60 characters of it."""
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
    """`a, b or c`."""
    shown = [show(word) for word in words]
    return f" {last} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The closest of `known`, or None."""
    return next(iter(difflib.get_close_matches(str(name), known, 1)), None)


def describe(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """What a value of this type looks like, in words: `a whole number, at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [c for a in arguments[1:] for c in (a.metadata if isinstance(a, FieldInfo) else [a])]
        return describe(arguments[0], [*inner, *constraints])
    if origin in (Union, types.UnionType):
        if bool in arguments:
            return join([True, False, *[word for a in arguments for word in get_args(a)]])
        return " or ".join(describe(a, constraints) for a in arguments)
    if origin is Literal:
        return join(arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list ({describe(arguments[0])} each)"
        return f"a list of {len(arguments)} ({describe(arguments[0])} each)"
    if origin is list:
        return f"a list ({describe(arguments[0])} each)"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with the keys {join(list(annotation.model_fields), 'and')}"
    if dict in (annotation, origin):
        return "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    text = words.get(annotation, str(annotation))
    limits = list(_limits(constraints)) if annotation in (int, float) else []
    return ", ".join([text, " and ".join(limits)] if limits else [text])


def _limits(constraints: Sequence[Any]) -> Iterator[str]:
    words = (
        (annotated_types.Ge, "ge", "at least"),
        (annotated_types.Gt, "gt", "greater than"),
        (annotated_types.Le, "le", "at most"),
        (annotated_types.Lt, "lt", "less than"),
    )
    for constraint in constraints:
        yield from (f"{word} {getattr(constraint, name)}" for kind, name, word in words if isinstance(constraint, kind))


def dotted_names(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key under a model, as `section.key`."""
    for name, field in model.model_fields.items():
        yield above + name
        for inner in _models(field.annotation):
            yield from dotted_names(inner, f"{above}{name}.")


def explain(root: type[BaseModel], error: ValidationError) -> list[SchemaProblem]:
    """One problem for each wrong key, in the order of the schema."""
    problems: dict[str, SchemaProblem] = {}
    for report in error.errors(include_url=False):
        problem = _explain(root, report)
        problems.setdefault(problem.path, problem)
    # A list is reported too short when it is one of its items that failed.
    return [p for p in problems.values() if not any(path.startswith((f"{p.path}[", f"{p.path}.")) for path in problems)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections a field may hold, through optional and list types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _explain(root: type[BaseModel], report: Any) -> SchemaProblem:
    """Walk the reported place down from the root; the tail that names a union's member is dropped."""
    path, keys = "", []
    section: type[BaseModel] | None = root
    owner, field = root, None
    for part in report["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif section is None:
            break
        else:
            path, owner, field = f"{path}.{part}".lstrip("."), section, section.model_fields.get(str(part))
            section = next(iter(_models(field.annotation)), None) if field else None
        keys.append(part)
    value = show(report["input"])
    if field is None:
        text = f"{path}={value}: no such key; {_suggest(root, owner, path, str(keys[-1]))}"
    elif report["type"] == "missing" and isinstance(keys[-1], int):
        path, _, _ = path.rpartition("[")
        text = f"{path}: must be {describe(field.annotation)}; {_default(field)}"
    elif report["type"] == "missing":
        text = f"{path}: is required; {_default(field)}"
    else:
        text = f"{path}={value}: must be {_rule(field, keys, report)}"
    return SchemaProblem(path, tuple(keys), text)


def _suggest(root: type[BaseModel], owner: type[BaseModel], path: str, name: str) -> str:
    above = path[: -len(name)]
    near = nearest(name, list(owner.model_fields))
    if near:
        return f"did you mean {above}{near}?"
    elsewhere: dict[str, str] = {}
    for dotted in dotted_names(root):
        elsewhere.setdefault(dotted.rpartition(".")[2], dotted)
    far = nearest(name, list(elsewhere))
    if far:
        return f"did you mean {elsewhere[far]}?"
    return f"known are {join([above + key for key in owner.model_fields], 'and')}"


def _rule(field: FieldInfo, keys: Sequence[str | int], report: Any) -> str:
    """What the value should have been, and how to get out."""
    annotation = field.annotation
    sequences = [a for a in (annotation, *get_args(annotation)) if get_origin(a) is tuple]
    if isinstance(keys[-1], int):
        return f"{describe(get_args(sequences[0])[0])}; correct this item"
    words = {
        "string_too_short": "text that is not empty",
        "string_pattern_mismatch": "text without a NUL character",
        "too_short": "a list that is not empty",
        "finite_number": "a finite number",
    }
    if report["type"] == "value_error":  # the section's own
        return f"{report['ctx']['error']}; {_default(field)}"
    if report["type"] in words:
        return f"{words[report['type']]}; {_default(field)}"
    if any(_models(a) for a in sequences):
        return f"{field.description}; {_default(field)}"
    names = [a for literal in _literals(annotation) for a in get_args(literal)]
    near = nearest(report["input"], names) if isinstance(report["input"], str) else None
    return f"{describe(annotation, field.metadata)}; " + (f"did you mean {near}?" if near else _default(field))


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [annotation]
    return [literal for argument in get_args(annotation) for literal in _literals(argument)]


def _default(field: FieldInfo) -> str:
    if field.is_required() or isinstance(field.default, BaseModel):
        return f"give {field.description or 'these, indented under it'}"
    return f"the default is {show(field.default)}"


def erase(raw: dict[str, Any], problem: SchemaProblem) -> None:
    """Take what the problem is about out of the nested mappings, so that the rest can still be read.

    A required key gets "?", and a list with a wrong item goes as a whole.
    """
    keys = list(problem.keys)
    keys = keys[: next((depth for depth, key in enumerate(keys) if isinstance(key, int)), len(keys))]
    place: Any = raw
    for key in keys[:-1]:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        return
    if ".".join(map(str, keys)) in REQUIRED:
        place[keys[-1]] = "?"
    elif keys[-1] in place:
        del place[keys[-1]]
    else:
        # Missing in a section that may be absent: without the section, nothing is missing.
        erase(raw, SchemaProblem("", tuple(keys[:-1]), ""))
