"""The weight table says which rows of which checkpoint tensors make up each rank's shard of each parameter.

Problem. Hugging Face and Megatron store the same weights differently. Megatron fuses the query, key and value
projections into one matrix, interleaved by key/value head, and the gate and up projections into another. Megatron also
pads the vocabulary, and shards the parameters over tensor- and pipeline-parallel ranks. Separate converters for loading
and for saving tend to become inconsistent, and a mistake in one of them silently trains or exports a wrong model.

Solution. Each model family has one declarative table of rules (:class:`~dpo_engine.model.families.rule.Rule`). A rule
describes a parameter, the checkpoint tensors that the parameter consists of, and how the rows of these tensors
interleave. :func:`pieces` turns a rule and a tensor-parallel rank into row ranges. The full parameter is a sequence of
blocks of rows. In the layouts ``plain`` and ``vocab``, each tensor is a block. In ``qkv``, the blocks are the q, k and
v rows of key/value head 0, then the rows of head 1, and so on. In ``glu``, the blocks are the gate and up rows of rank
0, then the rows of rank 1, and so on. A rank's shard is a contiguous range of this sequence. The pieces of the shard
are the intersections of this range with the blocks.

Why this way. Loading copies the pieces from tensors to shards, and saving copies the same pieces back, so saving is
always the inverse of loading. Every rank reads only its own slices, in any layout, without an intermediate format. The
table lists all expected names and shapes before a model is built, so a checkpoint can be checked by its headers alone.
Nothing is skipped silently: a parameter without a rule, a shard whose shape is not the shape that its rule gives, and
a tensor that is unused or written twice are errors. There are three exceptions. Stored rotary frequencies and masks are
ignored. A stored copy of tied embeddings is only compared with the original. Tensors of layers for multi-token
prediction, and tensors of parts of a model that the engine does not train, are not loaded; exports contain copies of
these tensors.

A tensor that contains all experts of a layer is divided into the tensors of the table when it is read. A quantized
tensor is also dequantized (:mod:`dpo_engine.model.weights.fused`).

Not covered. A rule can slice, stack, interleave, pad and transpose rows, and split columns evenly. It cannot permute
the rows within a head, or scale values.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.errors import EngineError
from dpo_engine.model.adaptation import PARAMETER, adapter_rule
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.rule import HFTensor, Rule, expected_tensors, size
from dpo_engine.platform.parallel import ParallelGroups

TE_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""Pairs of prefixes of norm weights: in Transformer Engine's fused modules, and in the weight table."""
TE_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
"""Matches the weight of an expert in Transformer Engine's module for all experts of a rank."""
EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


class Piece(NamedTuple):
    """Some rows of a rule's tensor, and their place in a rank's shard.

    tensor  index of the tensor in the rule
    rows    range of these rows in the tensor
    place   range of the shard's rows that these rows fill
    """

    tensor: int
    rows: slice
    place: slice


def pieces(rule: Rule, arch: Architecture, *, shard_rows: int, rank: int, tp: int) -> list[Piece]:
    """Compute which rows of a rule's tensors are in a rank's shard, and where.

    shard_rows   number of rows in the shard, the same on all ``tp`` ranks; no piece covers padding rows at the end

    If the rule shards columns, or if it shards nothing, every rank has all rows.
    """
    if rule.cut != 0:
        rank, tp = 0, 1
    rows = rule.row_counts(arch)
    parts = {"plain": 1, "vocab": 1, "qkv": arch.num_kv_heads, "glu": tp}[rule.layout]
    low, high = rank * shard_rows, (rank + 1) * shard_rows
    found, at = [], 0
    fused = len(rule.tensors) < len(rows)  # all parts are in one tensor
    for part in range(parts):
        for tensor, count in enumerate(rows):
            size = count // parts
            first, last = max(low, at), min(high, at + size)
            if first < last:
                start, place = first - at + part * size, slice(first - low, last - low)
                if rule.interleaved:
                    step = len(rows)
                    start, step = start * step + tensor, step
                else:
                    start, step = start + (sum(rows[:tensor]) if fused else 0), 1
                taken = slice(start, start + (last - first - 1) * step + 1, step)
                found.append(Piece(0 if fused else tensor, taken, place))
            at += size
    return found


class Placed(NamedTuple):
    """A parameter of this rank, with its rule, layer and expert.

    expert  index of the expert among all experts of the layer; None if the parameter does not belong to an expert
    copy    whether this is the second copy of tied weights, which is loaded but not saved
    shards  ranks that together have all shards; if the parameter is replicated, each of them has the whole parameter
    copies  ranks that have the same shard as this rank
    owners  ranks over which the layer's experts are distributed
    """

    parameter: Tensor
    rule: Rule
    layer: int | None
    expert: int | None
    copy: bool
    shards: dist.ProcessGroup
    copies: dist.ProcessGroup
    owners: dist.ProcessGroup

    @property
    def name(self) -> str:
        """Name of the parameter, which is the same in every layout."""
        return self.rule.parameter.format(l=self.layer, e=self.expert)

    @property
    def shard(self) -> int:
        """Index of this rank's shard; 0 for a replicated parameter."""
        return 0 if self.rule.cut is None else self.shards.rank()

    @property
    def written_here(self) -> bool:
        """Whether one of the ranks in :attr:`copies` must write this shard."""
        return not self.copy and (self.rule.cut is not None or self.shards.rank() == 0)

    def tensors(self, arch: Architecture) -> list[HFTensor]:
        """Return the tensors of the checkpoint that the parameter consists of, with their shapes."""
        return self.rule.hf_tensors(arch, self.layer, self.expert)


def placed_parameters(chunks: Sequence[nn.Module], arch: Architecture, groups: ParallelGroups) -> Iterator[Placed]:
    """Yield every parameter of this rank's model chunks with its rule.

    Raises :class:`~dpo_engine.errors.EngineError` if a parameter has no rule, or if its shape is not the shape that the
    rule gives.
    """
    rules = {rule.parameter: rule for rule in FAMILIES[arch.model_type].rules}
    first = arch.experts.count // groups.ep.size() * groups.ep.rank() if arch.experts else 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            name, expert = plain_name(name, first)
            local = re.match(r"decoder\.layers\.(\d+)\.", name)
            layer = chunk.decoder.layers[int(local[1])].layer_number - 1 if local else None
            key = f"decoder.layers.{{l}}.{name[local.end() :]}" if local else name
            rule = rules.get(key) or _adapter_rule(key, parameter, rules)
            if rule is None:
                raise EngineError(f"parameter {name}: model family {arch.model_type!r} has no rule for it")
            copy = bool(rule.tied_to and arch.tied_embeddings)
            if copy:
                rule = rules[rule.tied_to]
            shards, copies = groups.shards(rule.expert), groups.copies(rule.expert)
            _check_shape(name, parameter, rule, arch, shards.size())
            yield Placed(parameter, rule, layer, expert, copy, shards, copies, groups.ep)


def plain_name(name: str, first: int) -> tuple[str, int | None]:
    """Return a parameter's name in the form of the rules, and the index of its expert among all experts of the layer.

    The name differs from the name in a rule only in the layer: it contains the index of the layer in this rank's model
    chunk, and not ``{l}``. The index of the expert is None if the parameter does not belong to an expert.

    name   name in this rank's model, with native or Transformer Engine layers
    first  index of this rank's first expert among all experts of the layer
    """
    for fused, plain in TE_NAMES:
        name = name.replace(fused, plain)
    name = TE_EXPERT.sub(r"mlp.experts.local_experts.\2.\1.weight", name)
    local = EXPERT.search(name)
    return EXPERT.sub(".local_experts.{e}.", name), first + int(local[1]) if local else None


def _adapter_rule(key: str, parameter: Tensor, rules: dict[str, Rule]) -> Rule | None:
    """Return the rule of an adapter's parameter, derived from the adapted matrix's rule; None for other parameters."""
    found = PARAMETER.fullmatch(key)
    if found is None or f"{found['linear']}.weight" not in rules:
        return None
    rank = {"A": parameter.shape[0], "B": parameter.shape[-1], "magnitude": None}[found["part"]]
    return adapter_rule(rules[f"{found['linear']}.weight"], found["projection"], found["part"], rank)


def _check_shape(name: str, parameter: Tensor, rule: Rule, arch: Architecture, tp: int) -> None:
    """Check that a shard has exactly the shape that its rule gives; otherwise the wrong rows would be read.

    Only vocabulary parameters may have additional rows, for padding.
    """
    shape = [sum(rule.row_counts(arch))] + ([size(arch, rule.columns)] if rule.columns else [])
    if rule.layout == "vocab":
        shape[0] = max(shape[0], parameter.shape[0] * tp)
    if rule.cut is not None:
        shape[rule.cut] //= tp
    if list(parameter.shape) != shape:
        raise EngineError(f"parameter {name}: has shape {list(parameter.shape)}, but its rule gives {shape}")


def table_names(arch: Architecture) -> set[str]:
    """Return the names of all tensors that a checkpoint of ``arch`` must contain."""
    return {tensor.name for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch)}


def reports(groups: ParallelGroups) -> bool:
    """Whether this rank reports the names of the tensors that it loaded.

    In each stage, one rank reports the tensors outside of experts. An expert's tensors are reported by one of the ranks
    that hold the expert's shards. If data-parallel ranks hold copies of the expert, this rank holds a shard of the
    first copy.
    """
    return any(groups.shards(expert).rank() == 0 and groups.copies(expert).rank() == 0 for expert in (False, True))
