"""Check the options of a registered object, such as a loss or a callback, against the object's signature.

The options of an object are the named parameters that the engine does not pass itself. Their annotations and defaults
define which values are valid, so an object needs no schema.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from dpo_engine.registry import Registry
from dpo_engine.wording import describe, join, nearest, show


def options_of(registry: Registry, name: str) -> dict[str, Parameter]:
    """Return the options of a registered object, by name: its named parameters that the engine does not pass."""
    return parameters_after(registry[name], registry.passes, registry.reserved)


def parameters_after(entry: Any, passes: int = 0, reserved: tuple[str, ...] = ()) -> dict[str, Parameter]:
    """Return the named parameters of a function or class, by name. An object that cannot be called has no parameters.

    passes    number of leading positional parameters to leave out
    reserved  names of further parameters to leave out
    """
    if not callable(entry):
        return {}
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    parameters = list(signature(entry).parameters.values())
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    passed = {p.name for p in positional[:passes]} | set(reserved)
    return {p.name: p for p in parameters if p.kind in kinds and p.name not in passed}


def name_problem(registry: Registry, name: str, key: str, *, plugins: bool) -> str:
    """Return the error line about an unregistered name, with the nearest name and the registered names.

    key      beginning of the line, which shows where the name is given: ``callbacks.NAME`` or ``loss.name=NAME``
    plugins  whether the run imports plugins; if not, the line says how to register a name
    """
    near = nearest(name, list(registry))
    lead = f"did you mean {near}? Registered" if near else "registered"
    names = join(sorted(registry), "and") if registry else "none"
    more = "" if plugins else " (add more with plugins: [my.module])"
    return f"{key}: no such {registry.kind}; {lead} {registry.plural}: {names}{more}"


def option_problems(
    registry: Registry,
    name: str,
    given: Mapping[str, Any],
    above: str,
    way_out: Callable[[str], str | None] = lambda key: None,
) -> list[str]:
    """List the problems with the options ``given`` for the object that is registered under ``name``.

    above    key of the section that contains the options, such as ``callbacks.patience``
    way_out  function that returns advice about an unknown option, or None to suggest the nearest name
    """
    entry, known = registry[name], options_of(registry, name)
    problems = []
    for key, value in given.items():
        if key not in known:
            advice = way_out(key) or _nearest_option(registry, key, known, above)
            problems.append(f"{above}.{key}={show(value)}: {registry.kind} {name} has no such option; {advice}")
    for key, parameter in known.items():
        expected = _expected(entry, parameter)
        if key in given:
            if not _accepts(expected, given[key]):
                problems.append(
                    f"{above}.{key}={show(given[key])}: must be {describe(expected)}; {_default(parameter)}"
                )
        elif parameter.default is Parameter.empty:
            problems.append(f"{above}.{key}: is required by {registry.kind} {name}; give {describe(expected)}")
    check: Callable[[dict[str, Any]], list[str]] | None = getattr(entry, "problems", None)
    if check and not problems:
        problems = [f"{above}.{line}" for line in check(with_defaults(known, given))]
    return problems


def section_problems(
    registry: Registry, given: Mapping[str, Mapping[str, Any]], above: str, *, plugins: bool
) -> list[str]:
    """List the problems with a section that maps registered names to options, such as ``callbacks``.

    plugins  whether the run imports plugins
    """
    problems = []
    for name, options in given.items():
        key = f"{above}.{name}"
        if name not in registry:
            problems.append(name_problem(registry, name, key, plugins=plugins))
        else:
            problems += option_problems(registry, name, options, key)
    return problems


def with_defaults(known: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``given`` options, and the defaults of all other ``known`` options that have a default."""
    defaults = {name: option.default for name, option in known.items()}
    return {name: value for name, value in {**defaults, **given}.items() if value is not Parameter.empty}


def _nearest_option(registry: Registry, key: str, known: Mapping[str, Parameter], above: str) -> str:
    near = nearest(key, list(known))
    if near:
        return f"did you mean {above}.{near}?"
    return (
        f"its options: {join(list(known), 'and')}"
        if known
        else f"this {registry.kind} has no options; remove {above}.{key}"
    )


def _default(parameter: Parameter) -> str:
    return "fix the value" if parameter.default is Parameter.empty else f"the default is {show(parameter.default)}"


def _expected(entry: Any, parameter: Parameter) -> Any:
    """Return the type of an option: its annotation or, without an annotation, the type of its default."""
    try:
        function = entry.__init__ if isinstance(entry, type) else entry
        hints = typing.get_type_hints(function, include_extras=True)
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
        return True  # pydantic does not know this custom type; the object itself must check the value
    try:
        adapter.validate_python(tuple(value) if isinstance(value, list) and _is_tuple(expected) else value)
    except ValidationError:
        return False
    return True


def _is_tuple(expected: Any) -> bool:
    return expected is tuple or typing.get_origin(expected) is tuple
