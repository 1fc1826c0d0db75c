"""Translate pydantic's errors into lines of the form `path=value: rule; way out`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpo_engine.migration import foreign_key
from dpo_engine.wording import describe, join, nearest, show

# The required keys of the sections that every run has. Optional sections may have required keys too.
REQUIRED = ("model.path", "data.train", "train.output_dir")


@dataclass(frozen=True)
class SchemaProblem:
    path: str
    """dotted path with list indices, such as data.train[0].weight"""
    keys: tuple[str | int, ...]
    """the path's parts: keys of mappings and indices of lists"""
    text: str
    """error line shown to the user"""


def dotted_names(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield the dotted name (`section.key`) of every key in a model and its nested sections."""
    for name, field in model.model_fields.items():
        yield above + name
        for inner in _models(field.annotation):
            yield from dotted_names(inner, f"{above}{name}.")


def explain(root: type[BaseModel], error: ValidationError) -> list[SchemaProblem]:
    """Return one problem for each wrong key, in the order of the schema."""
    problems: dict[str, SchemaProblem] = {}
    for report in error.errors(include_url=False):
        problem = _explain(root, report)
        problems.setdefault(problem.path, problem)
    # pydantic also reports a list as too short if one of its items is invalid; keep only the item's problem.
    return [p for p in problems.values() if not any(path.startswith((f"{p.path}[", f"{p.path}.")) for path in problems)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in a field's type, including those inside optional and list types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _explain(root: type[BaseModel], report: Any) -> SchemaProblem:
    """Return the problem that one pydantic error describes.

    The error's location can contain names that are not keys of a section: the names of union members, and keys inside a
    mapping such as `rank_pattern`. These names are dropped.
    """
    path, keys = "", []
    section: type[BaseModel] | None = root
    owner, field = root, None
    for part in report["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif section is None:  # the name of a type in a union, or a key inside a mapping
            continue
        else:
            path, owner, field = f"{path}.{part}".lstrip("."), section, section.model_fields.get(str(part))
            section = next(iter(_models(field.annotation)), None) if field else None
        keys.append(part)
    value = show(report["input"])
    if field is None:
        text = f"{path}={value}: no such key; {_suggest(root, owner, path, str(keys[-1]))}"
    elif report["type"] == "missing" and isinstance(keys[-1], int):
        path, _, _ = path.rpartition("[")
        text = f"{path}: must be {describe(field.annotation)}; {_default(field, keys)}"
    elif report["type"] == "missing":
        text = f"{path}: is required; {_default(field, keys)}"
    else:
        text = f"{path}={value}: must be {_rule(field, keys, report)}"
    return SchemaProblem(path, tuple(keys), text)


def _suggest(root: type[BaseModel], owner: type[BaseModel], path: str, name: str) -> str:
    """Return the way out for an unknown key.

    The way out suggests the first of these keys that exists: the key with the same name in another section; the
    engine's equivalent of another system's key; the most similar key of the unknown key's section; the most similar
    key of any section. If none of these exists, the way out lists the keys of the unknown key's section.
    """
    above = path[: -len(name)]
    elsewhere: dict[str, str] = {}
    for dotted in dotted_names(root):
        elsewhere.setdefault(dotted.rpartition(".")[2], dotted)
    if name in elsewhere:
        return f"did you mean {elsewhere[name]}?"
    if ours := foreign_key(path):
        return ours
    near = nearest(name, list(owner.model_fields))
    if near:
        return f"did you mean {above}{near}?"
    far = nearest(name, list(elsewhere))
    if far:
        return f"did you mean {elsewhere[far]}?"
    return f"the known keys are {join([above + key for key in owner.model_fields], 'and')}"


def _rule(field: FieldInfo, keys: Sequence[str | int], report: Any) -> str:
    """Return the rule that the value violates, and the way out, as `rule; way out`."""
    annotation = field.annotation
    choices = [get_args(a)[0] if get_origin(a) is Annotated else a for a in (annotation, *get_args(annotation))]
    sequences = [a for a in choices if get_origin(a) is tuple]
    if isinstance(keys[-1], int):
        return f"{describe(get_args(sequences[0])[0])}; fix this item"
    words = {
        "string_too_short": "non-empty text",
        "string_pattern_mismatch": "text without a NUL character",
        "too_short": "a non-empty " + ("mapping" if isinstance(report["input"], dict) else "list"),
        "finite_number": "a finite number",
    }
    if report["type"] == "value_error":  # raised by a validator of the section
        rule = str(report["ctx"]["error"])
        return rule if "; " in rule else f"{rule}; {_default(field, keys)}"
    if report["type"] in words:
        return f"{words[report['type']]}; {_default(field, keys)}"
    if sources := [model for a in sequences for model in _models(a)]:
        parts = ", ".join(sources[0].model_fields)
        return f"a source or a list of sources; a source is a path or a mapping {{{parts}}}"
    names = [a for literal in _literals(annotation) for a in get_args(literal)]
    near = nearest(report["input"], names) if isinstance(report["input"], str) else None
    way_out = f"did you mean {near}?" if near else _default(field, keys)
    return f"{describe(annotation, field.metadata)}; {way_out}"


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [annotation]
    return [literal for argument in get_args(annotation) for literal in _literals(argument)]


def _default(field: FieldInfo, keys: Sequence[str | int]) -> str:
    if not field.is_required() and not isinstance(field.default, BaseModel):
        return f"the default is {show(field.default)}"
    if not field.description:
        return f"write the keys that you want to set, indented below `{keys[-1]}:`"
    return f"give {' '.join(field.description.split())}"


def erase(raw: dict[str, Any], problem: SchemaProblem) -> None:
    """Remove from the nested mappings the key that caused the problem, so that the rest can still be validated.

    A key in `REQUIRED` is set to "?" instead of being removed. A list with a wrong item is removed as a whole, and so
    is an optional section that lacks a required key.
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
        # An optional section lacks a required key: remove the whole section.
        erase(raw, SchemaProblem("", tuple(keys[:-1]), ""))
