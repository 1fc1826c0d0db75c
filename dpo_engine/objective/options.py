"""The options that a run gives a loss, held against the loss's signature."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from dpo_engine.objective.contract import LOSSES, Loss, loss_options, with_defaults
from dpo_engine.wording import describe, join, nearest, show

# What other systems call options, and what does the same here.
MIXED = "an added term is loss.name=mix with the other loss and sft in loss.losses"
ELSEWHERE = {
    "cpo_alpha": "it is called nll_weight here",
    "discopop_tau": "it is called tau here",
    "f_alpha_divergence_coef": "it is called alpha here",
    "f_divergence_type": "it is called divergence here",
    "gt_reward_scale": "it is called scale here",
    "ld_alpha": "it is loss.ld_alpha, which holds for all of them",
    "length_normalization": "it is called average here",
    "loss_type": "it is loss.name here",
    "loss_weights": "several losses are loss.name=mix with a list of them in loss.losses",
    "pref_beta": "it is called beta here",
    "pref_ftx": MIXED,
    "pref_loss": "it is loss.name here",
    "preference_average_log_probs": "it is called average here",
    "preference_loss": "it is loss.name here",
    "ref_policy_kl_penalty": "it is called beta here",
    "rpo_alpha": MIXED,
    "sft_loss_weight": MIXED,
    "simpo_gamma": "it is called gamma here",
    "use_weighting": "it is loss.use_weighting, which holds for all of them",
}


def option_problems(name: str, given: Mapping[str, Any], above: str) -> list[str]:
    """Everything wrong with the options ``given`` to the registered loss ``name``.

    above  the key of the run that they lie under
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
    options = f"its options are {join(list(known), 'and')}" if known else "it has none; leave it out"
    near = nearest(key, [*known, "name"])
    way_out = ELSEWHERE.get(key) or (f"did you mean {above}.{near}?" if near else options)
    return f"{above}.{key}={show(value)}: loss {name} has no such option; {way_out}"


def _way_out(parameter: Parameter) -> str:
    return "correct it" if parameter.default is Parameter.empty else f"the default is {show(parameter.default)}"


def _expected(loss: Loss, parameter: Parameter) -> Any:
    """The type of an option: its annotation, or the type of its default."""
    try:
        hints = typing.get_type_hints(loss, include_extras=True)
    except NameError:  # an annotation imported for type checkers only
        hints = {}
    if parameter.name in hints:
        return hints[parameter.name]
    return Any if parameter.default in (Parameter.empty, None) else type(parameter.default)


def _accepts(expected: Any, value: Any) -> bool:
    """Whether a value from YAML is of the type, ranges in `Annotated` included; a list will do for a tuple."""
    try:
        adapter = TypeAdapter(expected, config=ConfigDict(strict=True, allow_inf_nan=False))
    except PydanticSchemaGenerationError:
        return True  # a type of the fork's own, which the loss itself has to check
    try:
        adapter.validate_python(tuple(value) if isinstance(value, list) and _is_tuple(expected) else value)
    except ValidationError:
        return False
    return True


def _is_tuple(expected: Any) -> bool:
    return expected is tuple or typing.get_origin(expected) is tuple
