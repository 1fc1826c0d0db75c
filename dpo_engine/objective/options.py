"""Validation of a loss's options against its signature."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from dpo_engine.migration import foreign_key
from dpo_engine.objective.contract import LOSSES, Loss, loss_options, with_defaults
from dpo_engine.wording import describe, join, nearest, show

FOR_ALL = ("ld_alpha", "use_weighting")
"""Keys of the run's `loss` that apply to every loss."""


def option_problems(name: str, given: Mapping[str, Any], above: str) -> list[str]:
    """List the problems of the options ``given`` to the registered loss ``name``.

    above  key of the section that contains the options, such as ``loss``
    """
    loss = LOSSES[name]
    known = loss_options(loss)
    problems = [_unknown_option(name, key, value, known, above) for key, value in given.items() if key not in known]
    for key, parameter in known.items():
        expected = _expected(loss, parameter)
        if key in given:
            if not _accepts(expected, given[key]):
                problems.append(
                    f"{above}.{key}={show(given[key])}: must be {describe(expected)}; {_way_out(parameter)}"
                )
        elif parameter.default is Parameter.empty:
            problems.append(f"{above}.{key}: is required by loss {name}; give {describe(expected)}")
    check: Callable[[dict[str, Any]], list[str]] | None = getattr(loss, "problems", None)
    if check and not problems:
        problems = [f"{above}.{line}" for line in check(with_defaults(loss, given))]
    return problems


def all_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the registered loss ``name``, with its defaults for those that are not ``given``.

    Options of losses inside a loss (the entries of ``mix``) are completed too. A default that YAML cannot hold is left
    out.
    """
    loss = LOSSES[name]
    filled = {key: value for key, value in with_defaults(loss, given).items() if key in given or _is_plain(value)}
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(loss, "complete", None)
    return complete(filled) if complete else filled


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _unknown_option(name: str, key: str, value: Any, known: Mapping[str, Parameter], above: str) -> str:
    options = f"its options are {join(list(known), 'and')}" if known else "this loss has no options; remove it"
    near = nearest(key, [*known, "name"])
    if key in FOR_ALL:
        way_out = f"set loss.{key}, which applies to all losses"
    else:
        way_out = foreign_key(f"loss.{key}") or (f"did you mean {above}.{near}?" if near else options)
    return f"{above}.{key}={show(value)}: loss {name} has no such option; {way_out}"


def _way_out(parameter: Parameter) -> str:
    return "fix the value" if parameter.default is Parameter.empty else f"the default is {show(parameter.default)}"


def _expected(loss: Loss, parameter: Parameter) -> Any:
    """Return the type of an option: its annotation, or else the type of its default."""
    try:
        hints = typing.get_type_hints(loss, include_extras=True)
    except NameError:  # an annotation's type is imported only under TYPE_CHECKING
        hints = {}
    if parameter.name in hints:
        return hints[parameter.name]
    return Any if parameter.default in (Parameter.empty, None) else type(parameter.default)


def _accepts(expected: Any, value: Any) -> bool:
    """Whether a value from YAML has the expected type and range; a list is accepted for a tuple."""
    try:
        adapter = TypeAdapter(expected, config=ConfigDict(strict=True, allow_inf_nan=False))
    except PydanticSchemaGenerationError:
        return True  # pydantic does not know this custom type; the loss itself must check the value
    try:
        adapter.validate_python(tuple(value) if isinstance(value, list) and _is_tuple(expected) else value)
    except ValidationError:
        return False
    return True


def _is_tuple(expected: Any) -> bool:
    return expected is tuple or typing.get_origin(expected) is tuple
