"""Read the rotary fields of a ``config.json``."""

from typing import Any, NamedTuple

from dpo_engine.model.architecture import HFConfig

SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of scaling that are supported, and the fields with their parameters."""


class Rope(NamedTuple):
    """Rotary positions: base, scaling as in ``Architecture``, and the share of each head's dimensions that rotate."""

    theta: float = 1.0
    scaling: dict[str, Any] | None = None
    share: float = 1.0


def rope(config: HFConfig, *, theta: float = 10000.0, partial: float = 1.0) -> Rope:
    """Read the rotary fields.

    There are two forms of these fields: ``rope_theta`` and ``rope_scaling`` at the top level, or a ``rope_parameters``
    object that contains both. If a file has both forms, ``rope_scaling`` takes precedence, as in transformers.

    theta, partial  values if ``config.json`` omits ``rope_theta`` or ``partial_rotary_factor``
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict):
        config.problem(f"rope_scaling={values!r}: must be an object; correct config.json")
        return Rope()
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in SCALINGS:
        config.problem(f"rope_type={kind!r}: only {', '.join(SCALINGS)} are supported; use another model")
        return Rope()
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        config.problem(f"rope_parameters.{nested[0]}: per-layer rotary frequencies are not supported")
    inner = HFConfig({**_top_level(config, kind), **{k: v for k, v in values.items() if v is not None}}, config.where)
    base, share = inner.number("rope_theta", theta), inner.number("partial_rotary_factor", partial)
    numbers = {name: inner.number(name) for name in SCALINGS[kind]}
    if kind == "llama3" and not inner.problems and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        inner.problem(
            f"low_freq_factor={numbers['low_freq_factor']}: must be below "
            f"high_freq_factor={numbers['high_freq_factor']}; correct config.json"
        )
    if share > 1:
        inner.problem(f"partial_rotary_factor={share}: must be at most 1; correct config.json")
    config.problems += inner.problems
    return Rope(base, {"rope_type": kind, **numbers} if numbers else None, min(share, 1.0))


def _top_level(config: HFConfig, kind: str) -> dict[str, Any]:
    """Return the rotary fields that older files have at the top level; they are defaults for the inner object."""
    found = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    if kind == "llama3":
        found["original_max_position_embeddings"] = config.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        )
    return found
