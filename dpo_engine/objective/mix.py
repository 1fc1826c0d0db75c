"""A weighted sum of losses."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dpo_engine.objective.contract import (
    LOSSES,
    Loss,
    LossFacts,
    PairData,
    PairLogps,
    Part,
    apply_loss,
    loss_facts,
    with_defaults,
)
from dpo_engine.objective.options import all_options, option_problems
from dpo_engine.wording import nearest, show

Options = Mapping[str, Any]


def _part(entry: Options) -> tuple[float, Loss, dict[str, Any]]:
    """Return the weight, the loss and the complete options of an entry of ``losses``."""
    given = {key: value for key, value in entry.items() if key not in ("name", "weight")}
    loss = LOSSES[entry["name"]]
    return entry.get("weight", 1.0), loss, with_defaults(loss, given)


def _complete(options: Options) -> dict[str, Any]:
    """Return the options, with the defaults of each entry filled in."""
    entries = []
    for entry in options["losses"]:
        given = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        known = {"name": entry["name"], "weight": entry.get("weight", 1.0)}
        entries.append({**known, **all_options(entry["name"], given)})
    return {**options, "losses": entries}


def _facts(options: Options) -> list[tuple[float, LossFacts]]:
    return [(weight, loss_facts(loss, own)) for weight, loss, own in map(_part, options["losses"])]


def _needs_data(options: Options) -> tuple[str, ...]:
    return tuple(sorted({column for _, facts in _facts(options) for column in facts.needs_data}))


def _at_init(options: Options) -> float | None:
    values = [(weight, facts.at_init) for weight, facts in _facts(options)]
    return None if any(value is None for _, value in values) else sum(weight * value for weight, value in values)


def _reward(options: Options) -> LossFacts:
    """Return the facts of the loss that defines the rewards: the first loss with an option ``beta``.

    If no loss has this option, return the facts of the first loss.
    """
    parts = [_part(entry) for entry in options["losses"]]
    _, loss, own = next((part for part in parts if "beta" in part[2]), parts[0])
    return loss_facts(loss, own)


def _problems(options: Options) -> list[str]:
    entries = options["losses"]
    if not entries:
        return ["losses=[]: must not be empty; give at least one loss, with its name, weight and options"]
    return [line for index, entry in enumerate(entries) for line in _entry_problems(entry, f"losses[{index}]")]


def _entry_problems(entry: Options, above: str) -> list[str]:
    name, weight = entry.get("name"), entry.get("weight", 1.0)
    if name not in LOSSES or LOSSES[name] is mix:
        known = [other for other in LOSSES if LOSSES[other] is not mix]
        near = nearest(str(name), known)
        return [
            f"{above}.name={show(name)}: must be a registered loss other than mix; "
            + (f"did you mean {near}?" if near else f"for example {known[0]}")
        ]
    found = option_problems(name, {k: v for k, v in entry.items() if k not in ("name", "weight")}, above)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        found.insert(0, f"{above}.weight={show(weight)}: must be a number greater than 0; the default is 1.0")
    return found


def _term(weight: float, loss: Loss, own: Options) -> Part:
    def term(policy: PairLogps, reference: PairLogps | None, data: PairData) -> Tensor:
        return weight * apply_loss(loss, policy, reference, data, own)

    return term


def _parts(options: Options) -> dict[str, Part]:
    """Return the weighted terms; the keys are the names of their losses.

    If a name occurs several times, the second and later keys with this name end in a number, such as ``sft_2``.
    """
    found: dict[str, Part] = {}
    for entry in options["losses"]:
        name, number = entry["name"], 2
        while name in found:
            name, number = f"{entry['name']}_{number}", number + 1
        found[name] = _term(*_part(entry))
    return found


@LOSSES.register(
    "mix",
    "mpo",
    needs_reference=lambda options: any(facts.needs_reference for _, facts in _facts(options)),
    couples_pairs=lambda options: any(facts.couples_pairs for _, facts in _facts(options)),
    needs_data=_needs_data,
    likelihood_term=lambda options: any(facts.likelihood_term for _, facts in _facts(options)),
    at_init=_at_init,
    averages=lambda options: _reward(options).averages,
    reward_scale=lambda options: _reward(options).reward_scale,
    problems=_problems,
    parts=_parts,
    complete=_complete,
)
def mix(policy: PairLogps, reference: PairLogps | None, *, data: PairData, losses: list[dict[str, Any]]) -> Tensor:
    """Weighted sum of losses: ``sum_k weight_k loss_k``.

    losses  one mapping for each loss, with its ``name``, its ``weight`` (default 1) and its options

    Returns  [b]  one loss per pair

    *Source*: MPO (arXiv 2411.10442), which mixes sigmoid, bco_pair and sft with weights 0.8, 0.2 and 1.
    """
    return sum(_term(*part)(policy, reference, data) for part in map(_part, losses))
