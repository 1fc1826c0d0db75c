"""Validation of a loss's options against its signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_engine import options
from dpo_engine.migration import foreign_key
from dpo_engine.objective.contract import LOSSES, loss_options, with_defaults
from dpo_engine.wording import nearest

FOR_ALL = ("ld_alpha", "use_weighting")
"""Keys of the section ``loss`` that set weights of tokens or pairs. They apply to every loss, and are not options."""


def option_problems(name: str, given: Mapping[str, Any], above: str) -> list[str]:
    """List the problems of the options ``given`` to the registered loss ``name``.

    above  key of the section that contains the options, such as ``loss``
    """

    def way_out(key: str) -> str | None:
        if key in FOR_ALL:
            return f"set loss.{key}, which applies to all losses"
        near = nearest(key, [*loss_options(LOSSES[name]), "name"])
        return foreign_key(f"loss.{key}") or (f"did you mean {above}.{near}?" if near else None)

    return options.option_problems(LOSSES, name, given, above, way_out)


def all_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``given`` options of the registered loss ``name``, and the defaults of all its other options.

    The options of nested losses (the entries of ``mix``) are completed, too. A default that YAML cannot represent is
    omitted.
    """
    loss = LOSSES[name]
    filled = {key: value for key, value in with_defaults(loss, given).items() if key in given or _is_plain(value)}
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(loss, "complete", None)
    return complete(filled) if complete else filled


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
