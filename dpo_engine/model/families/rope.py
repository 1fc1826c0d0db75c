"""Read the rotary fields of a ``config.json``."""

import math
from typing import Any, NamedTuple

from dpo_engine.model.architecture import HFConfig

LENGTH = "original_max_position_embeddings"
KINDS = ("full_attention", "sliding_attention")
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
    "yarn": ("factor", LENGTH),
    "longrope": (LENGTH,),
}
"""The kinds of scaling that are supported, and the numbers that each of them requires.

``dynamic`` changes only rows longer than ``max_position_embeddings``, and the engine rejects such rows."""


class Rope(NamedTuple):
    """Rotary positions: base, scaling as in ``Architecture``, and the share of a head's dimensions that are rotated."""

    theta: float = 1.0
    scaling: dict[str, Any] | None = None
    share: float = 1.0


def rope(config: HFConfig, *, theta: float = 10000.0, partial: float = 1.0) -> Rope:
    """Read the rotary fields.

    There are two forms of these fields: ``rope_theta`` and ``rope_scaling`` at the top level, or a ``rope_parameters``
    object that contains ``rope_theta`` and the fields of the scaling. If a file has both forms, ``rope_scaling`` takes
    precedence, as in transformers.

    theta, partial  values if ``config.json`` omits ``rope_theta`` or ``partial_rotary_factor``
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    values = _objects(config, "rope_scaling" if config.get("rope_scaling") else "rope_parameters", values)
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        config.problem(f"rope_parameters.{nested[0]}: rotary positions cannot depend on the layer in this family")
    names = ("rope_theta", "partial_rotary_factor")
    outer = {name: config.get(name) for name in names if config.get(name) is not None}
    return _read(config, {**outer, **{k: v for k, v in values.items() if v is not None}}, theta, partial)


def ropes(config: HFConfig, *, theta: float, sliding: tuple[str | None, float]) -> dict[str, Any]:
    """Read the rotary fields of a family in which layers with a sliding window have their own rotary positions.

    ``rope_parameters`` has an object for each kind of layer. In older files, ``rope_theta`` and ``rope_scaling`` at the
    top level are for the layers without a window.

    theta    base for the layers without a window if ``config.json`` omits ``rope_theta``
    sliding  for the layers with a window in older files: the name of the field that contains their base, and the
             default of this field. If the family has no such field, the name is None, and the default is the base

    Returns the rotary fields of ``Architecture``. Those for layers with a window are omitted if they equal the others.
    """
    given = _objects(config, "rope_parameters", config.get("rope_parameters") or {})
    if given and not given.keys() & {*KINDS}:
        config.problem(
            "rope_parameters: must have an object for each kind of layer in this family; correct config.json"
        )
    full, near = (_objects(config, f"rope_parameters.{k}", given.get(k) or {}) for k in KINDS)
    full |= _objects(config, "rope_scaling", config.get("rope_scaling") or {})
    name, base = sliding
    near, full = ({field: value for field, value in kind.items() if value is not None} for kind in (near, full))
    found = _read(config, {"rope_theta": config.get("rope_theta", theta), **full}, theta, 1.0)
    other = _read(config, {"rope_theta": base if name is None else config.get(name, base), **near}, base, 1.0)
    if (found.share, other.share) != (1.0, 1.0):
        config.problem("partial_rotary_factor: must be 1 in this family; use another model")
    facts = {"rope_theta": found.theta, "rope_scaling": found.scaling}
    if (other.theta, other.scaling) == (found.theta, found.scaling):
        return facts
    return {**facts, "sliding_rope_theta": other.theta, "sliding_rope_scaling": other.scaling}


def _objects(config: HFConfig, name: str, value: Any) -> dict[str, Any]:
    """Return a copy of a JSON object; for any other value, record a problem and return an empty object."""
    if isinstance(value, dict):
        return dict(value)
    config.problem(f"{name}={value!r}: must be an object; correct config.json")
    return {}


def _read(config: HFConfig, values: dict[str, Any], theta: float, partial: float) -> Rope:
    kind = values.get("rope_type") or values.get("type") or "default"
    if not isinstance(kind, str) or kind not in SCALINGS:
        config.problem(f"rope_type={kind!r}: only {', '.join(SCALINGS)} are supported; use another model")
        return Rope()
    inner = HFConfig({LENGTH: config.get("max_position_embeddings"), **values}, config.where)
    if config.get(LENGTH) is not None:  # the outer value takes precedence, as in transformers
        inner.values[LENGTH] = config.get(LENGTH)
    base, share = inner.number("rope_theta", theta), inner.number("partial_rotary_factor", partial)
    if share > 1:
        inner.problem(f"partial_rotary_factor={share}: must be at most 1; correct config.json")
    numbers: dict[str, Any] = {name: inner.number(name) for name in SCALINGS[kind]}
    if not inner.problems:
        numbers |= OTHERS.get(kind, lambda *given: {})(config, inner, numbers)
    config.problems += inner.problems
    return Rope(base, {"rope_type": kind, **numbers} if numbers else None, min(share, 1.0))


def _llama3(config: HFConfig, inner: HFConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if not low < high:
        inner.problem(f"low_freq_factor={low}: must be below high_freq_factor={high}; correct config.json")
    return {}


def _yarn(config: HFConfig, inner: HFConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the optional numbers of the scaling ``yarn``.

    These are the edges of the ramp between interpolated and unchanged frequencies, a flag for rounding these edges, and
    the factor by which cosines and sines are multiplied.

    *Source*: YaRN (arXiv 2309.00071) eq. 22 for the factor.
    """

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(numbers["factor"]) + 1.0 if numbers["factor"] > 1 else 1.0

    weights = [inner.number(name) for name in ("mscale", "mscale_all_dim") if inner.get(name)]
    default = growth(weights[0]) / growth(weights[1]) if len(weights) == 2 else growth(1.0)
    return {
        "beta_fast": inner.number("beta_fast", 32.0),
        "beta_slow": inner.number("beta_slow", 1.0),
        "truncate": inner.flag("truncate", True),
        "attention_factor": inner.number("attention_factor", default),
    }


def mscale(config: HFConfig) -> float:
    """Return the factor by which queries and keys of DeepSeek models with YaRN are multiplied.

    It is 1 without ``mscale_all_dim``.

    *Source*: the function ``yarn_get_mscale`` in DeepSeek-V2's release.
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict) or (values.get("rope_type") or values.get("type") or "default") == "default":
        return 1.0
    inner = HFConfig(values, config.where)
    if not inner.get("mscale_all_dim"):
        return 1.0
    factor, weight = inner.number("factor"), inner.number("mscale_all_dim")
    config.problems += inner.problems
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(config: HFConfig, inner: HFConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the scaling ``longrope``.

    These are the divisor of each frequency for rows of at most the original length, and the factor by which cosines and
    sines are multiplied.
    """
    original = numbers[LENGTH]
    factors = inner.get("short_factor")
    if not isinstance(factors, list) or not all(type(each) in (int, float) and each > 0 for each in factors):
        inner.problem("short_factor: must be a list of numbers above 0; correct config.json")
        factors = []
    factor = inner.number("factor", config.count("max_position_embeddings") / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "short_factor": [float(each) for each in factors],
        "attention_factor": inner.number("attention_factor", default),
    }


OTHERS = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
"""Functions that check the required numbers of a kind of scaling, and read its other fields."""
