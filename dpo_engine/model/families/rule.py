"""The rules that make up the weight table of a model family.

A rule maps one parameter of the model to the Hugging Face tensors that it consists of. A rule gives sizes as numbers,
or as names of :class:`~dpo_engine.model.architecture.Architecture` attributes. One table therefore gives the names,
shapes and slices of all tensors, for loading and for saving, even before a model is built.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from dpo_engine.model.architecture import Architecture

LAYER = "decoder.layers.{l}."


class HFTensor(NamedTuple):
    """Name of a tensor in a Hugging Face checkpoint, and the shape that it must have for a given architecture."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One parameter of the model and the checkpoint tensors that it consists of.

    parameter   name in Megatron's local layer spec; ``{l}`` is the layer number, counted from 0 over all stages, and
                ``{e}`` the number of the expert, counted from 0 over all ranks
    tensors     names of the tensors in the checkpoint; several tensors are stacked along the rows
    rows        for each tensor, its number of rows, or the Architecture attribute with this number. A single tensor can
                contain several parts, such as the gate and up projections; ``rows`` then has an entry for each part
    columns     number of columns of every tensor, or the Architecture attribute with this number; None for vectors
    layout      order of the rows of several tensors or parts: ``plain`` (one after the other), ``qkv`` (interleaved by
                key/value head) or ``glu`` (interleaved by tensor-parallel rank). ``vocab`` is a single tensor, followed
                by padding rows
    cut         axis that is sharded over tensor-parallel ranks (for an expert, over expert-tensor-parallel ranks):
                0, 1, or None for a replicated parameter
    when        boolean Architecture attribute that is true if the model has the parameter; None if every model has it
    tied_to     parameter of which this one is a copy if the embeddings are tied
    transposed  whether the tensors are stored with rows and columns exchanged
    adapter     whether the parameter is part of an adapter. Its tensors are then stored in the PEFT format
    layers      kind of the layers that have the parameter: ``dense``, ``experts``, or None for all
    interleaved  in a single tensor with several parts, whether the rows of the parts alternate: the first row of each
                 part, then the second row of each part, and so on. Otherwise, each part follows the previous one

    An attribute of the Architecture can be nested, such as ``experts.count``.
    """

    parameter: str
    tensors: tuple[str, ...]
    rows: tuple[str | int, ...]
    columns: str | int | None = None
    layout: str = "plain"
    cut: int | None = None
    when: str | None = None
    tied_to: str | None = None
    transposed: bool = False
    adapter: bool = False
    layers: str | None = None
    interleaved: bool = False

    @property
    def expert(self) -> bool:
        """Whether each expert has its own parameter."""
        return "{e}" in self.parameter

    def applies(self, arch: Architecture) -> bool:
        """Whether a checkpoint of ``arch`` must contain the tensors of this rule."""
        if self.layers is not None and not arch.layers(self.layers):
            return False
        return (self.when is None or attrgetter(self.when)(arch)) and not (self.tied_to and arch.tied_embeddings)

    def places(self, arch: Architecture) -> list[tuple[int | None, int | None]]:
        """Return the layer and the expert of each parameter of this rule in the whole model.

        The layer is None if the parameter belongs to no layer. The expert is None if it belongs to no expert.
        """
        layers: list[int | None] = [*arch.layers(self.layers)] if "{l}" in self.parameter else [None]
        experts: list[int | None] = [*range(arch.experts.count)] if self.expert else [None]
        return [(layer, expert) for layer in layers for expert in experts]

    def uses(self, arch: Architecture) -> int:
        """Return the number of this rule's parameters that a token uses. The rule must be for parameters of layers.

        In each layer, a token uses one parameter or, if the parameters belong to experts, one for each chosen expert.
        """
        return len(arch.layers(self.layers)) * (arch.experts.chosen if self.expert else 1)

    def row_counts(self, arch: Architecture) -> list[int]:
        """Return the number of rows of each tensor or, if one tensor contains several parts, of each part."""
        return [size(arch, name) for name in self.rows]

    def parameters(self, arch: Architecture, tp: int = 1) -> int:
        """Return the number of elements of the parameter on each of ``tp`` ranks."""
        columns = 1 if self.columns is None else size(arch, self.columns)
        return sum(self.row_counts(arch)) * columns // (1 if self.cut is None else tp)

    def hf_tensors(self, arch: Architecture, layer: int | None = None, expert: int | None = None) -> list[HFTensor]:
        """Return the names and shapes of the rule's tensors for the given layer and the given expert."""
        rest = () if self.columns is None else (size(arch, self.columns),)
        counts = self.row_counts(arch)
        if len(self.tensors) == 1:
            counts = [sum(counts)]
        shapes = [(*rest, rows) if self.transposed else (rows, *rest) for rows in counts]
        named = zip(self.tensors, shapes, strict=True)
        return [HFTensor(name.format(l=layer, e=expert), shape) for name, shape in named]


@dataclass(frozen=True)
class Fused:
    """A tensor of the checkpoint that contains tensors of all experts of a layer, one expert after the other.

    The weight table has a tensor for each expert, whether or not the checkpoint fuses them. The fused tensor has one
    more axis, the first one, whose index is the number of the expert. There is one exception: if the only name in
    ``parts`` has no ``{e}``, the tensor is not fused. It only has a different name in the checkpoint.

    tensor   name of the fused tensor; ``{l}`` is the layer number
    parts    names, in the weight table, of the tensors that the fused tensor contains for each expert, in this order;
             ``{e}`` is the number of the expert
    written  whether exports contain the fused tensor. If not, the fused tensor is only read, and exports have a tensor
             for each expert
    """

    tensor: str
    parts: tuple[str, ...]
    written: bool = False


def size(arch: Architecture, value: str | int) -> int:
    """Return a size that is given as a number or as the name of an Architecture attribute."""
    return value if isinstance(value, int) else attrgetter(value)(arch)


def expected_tensors(rules: tuple[Rule, ...], arch: Architecture) -> Iterator[tuple[HFTensor, Rule]]:
    """Yield every tensor that a checkpoint of ``arch`` must contain, with the rule that uses it."""
    for rule in rules:
        if rule.applies(arch):
            for place in rule.places(arch):
                for tensor in rule.hf_tensors(arch, *place):
                    yield tensor, rule
