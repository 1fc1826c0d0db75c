"""Validation of a loss's options against its signature."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from dpo_engine.objective.contract import LOSSES, Loss, loss_options, with_defaults
from dpo_engine.wording import describe, join, nearest, show

# Option names of other systems, and their equivalents here.
MIXED = "to add a likelihood term, use loss.name=mix with the other loss and sft in loss.losses"
ELSEWHERE = {
    "cpo_alpha": "it is called nll_weight here",
    "discopop_tau": "it is called tau here",
    "f_alpha_divergence_coef": "it is called alpha here",
    "f_divergence_type": "it is called divergence here",
    "gt_reward_scale": "it is called scale here",
    "ld_alpha": "set loss.ld_alpha, which applies to all losses",
    "length_normalization": "it is called average here",
    "loss_type": "it is called loss.name here",
    "loss_weights": "to combine losses, use loss.name=mix with a list of them in loss.losses",
    "pref_beta": "it is called beta here",
    "pref_ftx": MIXED,
    "pref_loss": "it is called loss.name here",
    "preference_average_log_probs": "it is called average here",
    "preference_loss": "it is called loss.name here",
    "ref_policy_kl_penalty": "it is called beta here",
    "rpo_alpha": MIXED,
    "sft_loss_weight": MIXED,
    "simpo_gamma": "it is called gamma here",
    "use_weighting": "set loss.use_weighting, which applies to all losses",
}


def option_problems(name: str, given: Mapping[str, Any], above: str) -> list[str]:
    """List the problems of the options ``given`` to the registered loss ``name``.

    above  the key that the options are under, such as ``loss``
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


def _unknown_option(name: str, key: str, value: Any, known: Mapping[str, Parameter], above: str) -> str:
    options = f"its options are {join(list(known), 'and')}" if known else "it has none; remove it"
    near = nearest(key, [*known, "name"])
    way_out = ELSEWHERE.get(key) or (f"did you mean {above}.{near}?" if near else options)
    return f"{above}.{key}={show(value)}: loss {name} has no such option; {way_out}"


def _way_out(parameter: Parameter) -> str:
    return "fix the value" if parameter.default is Parameter.empty else f"the default is {show(parameter.default)}"


def _expected(loss: Loss, parameter: Parameter) -> Any:
    """Return the type of an option: its annotation, or else the type of its default."""
    try:
        hints = typing.get_type_hints(loss, include_extras=True)
    except NameError:  # the annotation is imported only under TYPE_CHECKING
        hints = {}
    if parameter.name in hints:
        return hints[parameter.name]
    return Any if parameter.default in (Parameter.empty, None) else type(parameter.default)


def _accepts(expected: Any, value: Any) -> bool:
    """Whether a value from YAML has the type, including ranges in `Annotated`; a list is accepted for a tuple."""
    try:
        adapter = TypeAdapter(expected, config=ConfigDict(strict=True, allow_inf_nan=False))
    except PydanticSchemaGenerationError:
        return True  # a custom type that pydantic does not know; the loss has to check it
    try:
        adapter.validate_python(tuple(value) if isinstance(value, list) and _is_tuple(expected) else value)
    except ValidationError:
        return False
    return True


def _is_tuple(expected: Any) -> bool:
    return expected is tuple or typing.get_origin(expected) is tuple
