"""Freeze weights that are selected by their names in the Hugging Face checkpoint (``optim.freeze``).

Some parameters of the model consist of several checkpoint tensors. For example, the query, key and value projections
form one parameter. The tensors of one parameter can be frozen only together, because an optimizer updates whole
parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from torch import nn

from dpo_engine.config.run import Config
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.rule import HFTensor, Rule, expected_tensors
from dpo_engine.model.weights.table import placed_parameters
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.wording import nearest, show

ROUTERS = ("mlp.router.weight", "mlp.router.bias")


def frozen_patterns(config: Config, arch: Architecture) -> tuple[str, ...]:
    """Return the patterns of ``optim.freeze`` and, with ``train.freeze_router``, patterns for all routers."""
    if not config.train.freeze_router:
        return config.optim.freeze
    routers = [rule for rule in FAMILIES[arch.model_type].rules if rule.parameter.endswith(ROUTERS)]
    names = [name for rule in routers if rule.applies(arch) for name in rule.tensors]
    return (*config.optim.freeze, *(re.escape(name).replace(r"\{l\}", r"\d+") for name in names))


def router_problems(config: Config, arch: Architecture) -> list[str]:
    """If the model has no experts, list the router settings that are set, because they have no effect."""
    if arch.experts is not None:
        return []
    settings = {"loss.balance": config.loss.balance, "loss.router_z": config.loss.router_z}
    settings["train.freeze_router"] = config.train.freeze_router
    why = f"model type {arch.model_type} has no experts; remove"
    return [f"{key}={show(value)}: {why} {key}" for key, value in settings.items() if value]


def frozen_tensors(patterns: Sequence[str], arch: Architecture) -> dict[str, HFTensor]:
    """Return, by name, those tensors of the checkpoint whose whole name matches any of the regular expressions."""
    compiled = [re.compile(pattern) for pattern in patterns]
    tensors = (tensor for tensor, _ in _tensors(arch))
    return {tensor.name: tensor for tensor in tensors if any(p.fullmatch(tensor.name) for p in compiled)}


def freeze_problems(patterns: Sequence[str], arch: Architecture) -> list[str]:
    """List the problems of ``optim.freeze``.

    These are invalid patterns, patterns without a match, a selection of all weights, and parameters of which only some
    tensors are selected.
    """
    if not patterns:
        return []
    problems, names = [], [tensor.name for tensor, _ in _tensors(arch)]
    for index, pattern in enumerate(patterns):
        key = f"optim.freeze[{index}]={show(pattern)}"
        try:
            found = re.compile(pattern)
        except re.error as error:
            problems.append(f"{key}: is not a regular expression ({error}); correct it")
            continue
        if not any(found.fullmatch(name) for name in names):
            problems.append(f"{key}: matches no weight of the model; {_way_out(pattern, names, arch)}")
    if problems:
        return problems
    frozen = frozen_tensors(patterns, arch)
    if len(frozen) == len(names):
        return ["optim.freeze: freezes every weight of the model; leave some weights to train"]
    split = []
    for rule, parts in _parameters(arch):
        kept = [name for name in parts if name not in frozen]
        if kept and len(kept) < len(parts):
            split.append((rule, next(name for name in parts if name in frozen), kept))
    if not split:
        return []
    rule, first, kept = split[0]
    where = rule.parameter.rpartition(".")[0].rpartition(".")[2]
    where += f", the first of {len(split)} partly frozen parameters" if len(split) > 1 else ""
    return [
        f"optim.freeze: freezes {first}, but not {' and '.join(kept)}, which are stored in the same parameter "
        f"({where}); freeze all weights of a parameter, or none of them"
    ]


def freezes_some_experts(patterns: Sequence[str], arch: Architecture) -> bool:
    """Whether the patterns freeze a matrix of some experts of a layer, but not the same matrix of the other experts.

    Transformer Engine computes gradients for all experts of a rank if the first of these experts is trained. Otherwise,
    it computes gradients for none of them.
    """
    frozen = frozen_tensors(patterns, arch) if patterns and arch.experts else {}
    found: dict[tuple[str, int | None], set[bool]] = {}
    for rule in FAMILIES[arch.model_type].rules if frozen else ():
        if rule.expert and rule.applies(arch):
            for layer, expert in rule.places(arch):
                first = rule.hf_tensors(arch, layer, expert)[0].name
                found.setdefault((rule.parameter, layer), set()).add(first in frozen)
    return any(len(kinds) > 1 for kinds in found.values())


def freeze(chunks: Sequence[nn.Module], arch: Architecture, patterns: Sequence[str], groups: ParallelGroups) -> None:
    """Exclude the selected weights of this rank's model chunks from training. Call this before DDP wraps the chunks."""
    if not patterns:
        return
    frozen = frozen_tensors(patterns, arch)
    for placed in placed_parameters(chunks, arch, groups):
        if placed.tensors(arch)[0].name in frozen:
            placed.parameter.requires_grad_(False)
    for chunk in chunks:
        chunk.frozen_input = True


def frozen_lines(patterns: Sequence[str], arch: Architecture) -> list[str]:
    """Return the log line with the number of frozen parameters, in a list; the list is empty without ``patterns``."""

    def count(tensors: Iterable[HFTensor]) -> int:
        return sum(math.prod(tensor.shape) for tensor in tensors)

    if not patterns:
        return []
    frozen, total = count(frozen_tensors(patterns, arch).values()), count(tensor for tensor, _ in _tensors(arch))
    return [f"frozen: {frozen:,} of {total:,} parameters"]


def _tensors(arch: Architecture) -> list[tuple[HFTensor, Rule]]:
    return list(expected_tensors(FAMILIES[arch.model_type].rules, arch))


def _parameters(arch: Architecture) -> list[tuple[Rule, list[str]]]:
    """Return the rule of each parameter of the model, with the names of the tensors that the parameter consists of."""
    found = []
    for rule in FAMILIES[arch.model_type].rules:
        if rule.applies(arch):
            for place in rule.places(arch):
                found.append((rule, [tensor.name for tensor in rule.hf_tensors(arch, *place)]))
    return found


def _way_out(pattern: str, names: Sequence[str], arch: Architecture) -> str:
    if arch.tied_embeddings and re.fullmatch(pattern, "lm_head.weight"):
        return "the embeddings are tied, so use model.embed_tokens.weight"
    partial = [name for name in names if re.search(pattern, name)]
    if partial:
        return f"a pattern must match a whole name, such as {partial[0]}"
    near = nearest(pattern, names)
    return f"did you mean {near}?" if near else f"an example of a name is {names[0]}"
