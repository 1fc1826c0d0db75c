"""Which rows of which checkpoint tensors make up each parameter shard, by the family's weight table."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from dpo_engine.errors import EngineError
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.blocks import Rule, expected_tensors
from dpo_engine.platform.parallel import ParallelGroups

TE_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""Transformer Engine's fused modules hold the norm's weight; the table uses the names of the local layer spec."""


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of tensor number ``tensor`` lie at row ``at`` of a rank's shard."""

    tensor: int
    start: int
    stop: int
    at: int


def pieces(rule: Rule, arch: Architecture, *, shard_rows: int, rank: int, tp: int) -> list[Piece]:
    """Which rows of a rule's tensors a rank's shard holds, and where; the same for weights, biases and adapters.

    shard_rows   rows of the shard on each of the ``tp`` ranks; rows past the last tensor's (padding) are in no piece

    A rule cut along its columns, or not at all, has all rows on every rank.
    """
    if rule.cut != 0:
        rank, tp = 0, 1
    rows = rule.row_counts(arch)
    parts = {"plain": 1, "vocab": 1, "qkv": arch.num_kv_heads, "glu": tp}[rule.layout]
    low, high = rank * shard_rows, (rank + 1) * shard_rows
    found, at = [], 0
    for part in range(parts):
        for tensor, count in enumerate(rows):
            size = count // parts
            first, last = max(low, at), min(high, at + size)
            if first < last:
                shift = part * size - at
                found.append(Piece(tensor, first + shift, last + shift, first - low))
            at += size
    return found


class Placed(NamedTuple):
    """A parameter of this rank with its rule. ``copy``: a second copy of a tied tensor, loaded but not saved."""

    parameter: Tensor
    rule: Rule
    layer: int | None
    copy: bool


def placed_parameters(chunks: Sequence[nn.Module], arch: Architecture, *, tp: int) -> Iterator[Placed]:
    """Every parameter of this rank's model chunks with the rule that it is made by.

    Raises :class:`~dpo_engine.errors.EngineError` for a parameter without a rule or of another shape than its rule's.
    """
    rules = {rule.parameter: rule for rule in FAMILIES[arch.model_type].rules}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            for fused, plain in TE_NAMES:
                name = name.replace(fused, plain)
            local = re.match(r"decoder\.layers\.(\d+)\.", name)
            layer = chunk.decoder.layers[int(local[1])].layer_number - 1 if local else None
            key = f"decoder.layers.{{l}}.{name[local.end() :]}" if local else name
            if key not in rules:
                raise EngineError(f"parameter {name}: model family {arch.model_type!r} has no rule for it")
            rule = rules[key]
            copy = bool(rule.tied_to and arch.tied_embeddings)
            if copy:
                rule = rules[rule.tied_to]
            _check_shape(name, parameter, rule, arch, tp)
            yield Placed(parameter, rule, layer, copy)


def _check_shape(name: str, parameter: Tensor, rule: Rule, arch: Architecture, tp: int) -> None:
    """A shard that its rule does not exactly fill would be read as another layout; only a vocabulary has padding."""
    shape = [sum(rule.row_counts(arch))] + ([getattr(arch, rule.columns)] if rule.columns else [])
    if rule.layout == "vocab":
        shape[0] = max(shape[0], parameter.shape[0] * tp)
    if rule.cut is not None:
        shape[rule.cut] //= tp
    if list(parameter.shape) != shape:
        raise EngineError(f"parameter {name}: has shape {list(parameter.shape)}, its rule makes {shape}")


def table_names(arch: Architecture) -> set[str]:
    return {tensor.name for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch)}


def leads_stage(groups: ParallelGroups) -> bool:
    """Whether this rank speaks for its pipeline stage."""
    return groups.tp.rank() == 0 and groups.dp_cp.rank() == 0
