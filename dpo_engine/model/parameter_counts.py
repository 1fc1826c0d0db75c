"""Count the parameters of a model, of its layers, and of pipeline stages, from the weight tables."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.platform.dims import ParallelDims


class Parameters(NamedTuple):
    """Number of parameters outside of experts (``others``), and number of parameters of experts."""

    others: int
    experts: int


def layer_parameters(arch: Architecture, dims: ParallelDims, layer: int) -> Parameters:
    """Return the numbers of parameters that one transformer layer has on each rank."""
    others = experts = 0
    for rule in FAMILIES[arch.model_type].rules:
        if "{l}" in rule.parameter and rule.applies(arch) and layer in arch.layers(rule.layers):
            if rule.expert:
                experts += arch.experts.count // dims.ep * rule.parameters(arch, dims.etp)
            else:
                others += rule.parameters(arch, dims.tp)
    return Parameters(others, experts)


def parameters(arch: Architecture) -> int:
    """Return the number of parameters in the whole model, with the vocabulary size of its checkpoint (not padded)."""
    rules = [rule for rule in FAMILIES[arch.model_type].rules if rule.applies(arch)]
    return sum(rule.parameters(arch) * len(rule.places(arch)) for rule in rules)


def active_parameters(arch: Architecture) -> int:
    """Return the number of parameters that each token uses: all except those of the experts that the token skips."""
    if arch.experts is None:
        return parameters(arch)
    rules = [rule for rule in FAMILIES[arch.model_type].rules if rule.expert]
    unused = sum(rule.parameters(arch) * (len(rule.places(arch)) - rule.uses(arch)) for rule in rules)
    return parameters(arch) - unused


def stage_parameters(arch: Architecture, dims: ParallelDims, stage: int) -> int:
    """Return the number of parameters on one rank of a pipeline stage; see :func:`stage_counts`."""
    return sum(stage_counts(arch, dims, stage))


@lru_cache(maxsize=4096)
def stage_counts(arch: Architecture, dims: ParallelDims, stage: int) -> Parameters:
    """Return the numbers of parameters on one rank of a pipeline stage, with the padded vocabulary.

    The numbers include all model chunks of the stage. If embeddings are tied and there are several stages, the first
    and the last stage both store the embeddings.
    """
    embedding = dims.padded_vocab(arch.vocab_size) // dims.tp * arch.hidden_size
    every = [layer_parameters(arch, dims, layer) for layer in dims.layers_of(stage, arch.num_layers)]
    count = sum(layer.others for layer in every)
    first, last = stage == 0, stage == dims.pp - 1
    if first:
        count += embedding + arch.learned_positions * arch.max_positions * arch.hidden_size
    if last:
        rules = FAMILIES[arch.model_type].rules
        norm = [rule for rule in rules if rule.parameter.startswith("decoder.final_layernorm.") and rule.applies(arch)]
        count += sum(rule.parameters(arch) for rule in norm) + (0 if first and arch.tied_embeddings else embedding)
    return Parameters(count, sum(layer.experts for layer in every))
