"""Find the problems of the section ``adapter``: settings that are invalid, or that match no projection."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dpo_engine.config.adapter_section import AdapterConfig
from dpo_engine.model.adaptation import (
    ALL_LINEAR,
    UNSUPPORTED,
    Adaptation,
    adapter_shapes,
    ending,
    expert_names,
    matches,
    projection_names,
)
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.rule import expected_tensors
from dpo_engine.wording import join, nearest, show


def adaptation_problems(asked: AdapterConfig, arch: Architecture, *, unused: bool = False) -> list[str]:
    """List the problems of a section ``adapter`` without ``path``: bad patterns, and unknown names and layers.

    A target is also a problem if it matches weights that cannot be adapted, such as matrices of experts.

    unused  True: follow PEFT, which accepts settings without effect. The names in a list of targets, and the
            expressions in ``rank_pattern`` and ``alpha_pattern``, may then match nothing. Targets may match matrices of
            experts in addition to projections. A name in a list of targets is still a problem if it matches no
            projection, and its last part is the name of a module that has weights but no adapters, such as a norm or a
            matrix of experts
    """
    names = projection_names(arch)
    problems = _pattern_problems(asked)
    if problems:
        return problems
    if isinstance(asked.targets, str):
        experts = dict.fromkeys(() if unused else expert_names(arch), "experts have no adapters")
        others = {name: why for name, why in (UNSUPPORTED | experts).items() if re.fullmatch(asked.targets, name)}
        if others and asked.targets != ALL_LINEAR:
            first, why = next(iter(others.items()))
            problems.append(
                f"adapter.targets={show(asked.targets)}: matches {first}, which cannot be adapted, because {why}; "
                "restrict the expression"
            )
        elif asked.targets != ALL_LINEAR and not any(re.fullmatch(asked.targets, name) for name in names):
            problems.append(_no_match("adapter.targets", asked.targets, names))
    else:
        for index, target in enumerate(asked.targets):
            if not unused and any(f".{name}".endswith(f".{target}") for name in expert_names(arch)):
                whole = next((name for name in names if name.endswith(f".{target}")), None)
                problems.append(
                    f"adapter.targets[{index}]={show(target)}: matches matrices of experts, which have no adapters; "
                    + (f"write whole names, such as {whole}, or remove this target" if whole else "remove this target")
                )
            elif not any(name == target or name.endswith(f".{target}") for name in names) and (
                not unused or target.rpartition(".")[2] in {*UNSUPPORTED, *_others(arch)}
            ):
                problems.append(_no_match(f"adapter.targets[{index}]", target, names))
    for index in asked.layers or ():
        if index >= arch.num_layers:
            problems.append(
                f"adapter.layers: contains {index}, but the model's layers are 0 to {arch.num_layers - 1}; "
                f"remove {index}"
            )
    if problems:
        return problems
    adapted = adapter_shapes(Adaptation.of(asked, arch), arch)
    if not adapted:
        return ["adapter: no projection matches both adapter.targets and adapter.layers; change one of them"]
    for key in () if unused else ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(asked, key):
            if not any(matches(pattern, name) for name in adapted):
                problems.append(f"adapter.{key}: {show(pattern)} matches no adapted projection; remove this expression")
    return problems


def _pattern_problems(asked: AdapterConfig) -> list[str]:
    patterns = {"adapter.rank_pattern": asked.rank_pattern, "adapter.alpha_pattern": asked.alpha_pattern}
    written = [(key, pattern) for key, values in patterns.items() for pattern in values]
    if isinstance(asked.targets, str) and asked.targets != ALL_LINEAR:
        written.append(("adapter.targets", asked.targets))
    problems = []
    for key, pattern in written:
        try:
            re.compile(pattern if key == "adapter.targets" else ending(pattern))
        except re.error as error:
            problems.append(f"{key}: {show(pattern)} is not a regular expression ({error}); correct it")
    if asked.layers is not None and isinstance(asked.targets, str) and asked.targets != ALL_LINEAR:
        problems.append(
            "adapter.layers: requires a list of names in adapter.targets, but adapter.targets is a regular expression; "
            "put the layers into this expression"
        )
    return problems


def _others(arch: Architecture) -> set[str]:
    """Return the last parts of the names of all modules that have weights and are not projections."""
    tensors = (tensor.name.split(".") for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch))
    return {name[-2] for name in tensors} - {name.rpartition(".")[2] for name in projection_names(arch)}


def _no_match(key: str, name: str, names: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    if last in UNSUPPORTED:
        return f"{key}={show(name)}: cannot be adapted, because {UNSUPPORTED[last]}; remove this target"
    known = list(dict.fromkeys(found.rpartition(".")[2] for found in names))
    if key == "adapter.targets" and name in known:
        return (
            f"{key}={name}: a text is read as a regular expression, which must match whole names; write the list "
            f"[{name}]"
        )
    near = nearest(name, known)
    return f"{key}={show(name)}: matches no projection; " + (
        f"did you mean {near}?" if near else f"the model has {join(known, 'and')}"
    )
