"""Read tensors that contain all experts of a layer, and quantized tensors, as tensors of single experts.

The weight table has tensors for each expert. Checkpoints of gpt-oss, and checkpoints that transformers saves with
``save_original_format=False``, have fused tensors instead. A fused tensor contains all experts of a layer. A part of a
fused tensor is read like a separate tensor, without the other parts. The published checkpoints of gpt-oss also store
the matrices of experts in the format MXFP4. These matrices are dequantized when they are read. The results are exact,
unless a value is too large for bf16.

*Source*: OCP Microscaling Formats (MX) Specification 1.0, sections 5.2 and 6.3.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.rule import Fused, expected_tensors

MAYBE = re.compile(r"\.(experts\.[a-z_]+|mlp\.gate\.weight)$")
"""Matches the names of tensors that can contain all experts of a layer, and the name that the router's weight has in
some checkpoints with such tensors."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the names of the two tensors of a quantized matrix."""
SIZE = 32
"""Number of values of a quantized matrix that have a common scale."""
NAN = 255
"""If a scale has this value, all values with this scale are NaN."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of FP4 (E2M1), by their three bits. The fourth bit is the sign."""
VALUES = torch.tensor([sign * value for sign in (1, -1) for value in MAGNITUDES])
PAIRS = torch.stack([VALUES.repeat(16), VALUES.repeat_interleave(16)], dim=1)
"""The two values of each byte; the lower four bits are the first value."""


class Place(NamedTuple):
    """Where the files contain a tensor of the weight table.

    tensor   name in the files; for a quantized tensor, the name without the suffixes ``BLOCKS`` and ``SCALES``
    expert   index on the first axis; None: the tensor is not fused, but has a different name
    part     index of the tensor among the parts that are stacked along the rows
    parts    number of these parts
    packed   whether the tensor is quantized
    experts  number of experts in the layer
    """

    tensor: str
    expert: int | None
    part: int
    parts: int
    packed: bool
    experts: int

    @property
    def stored(self) -> list[str]:
        """Names of the tensors in the files."""
        return [self.tensor + end for end in (BLOCKS, SCALES)] if self.packed else [self.tensor]

    def shape(self, stored: Sequence[int]) -> tuple[int, ...] | None:
        """Return the tensor's shape, given the shape of the first stored tensor; None if that shape does not fit."""
        if self.expert is None:
            return tuple(stored)
        count, *rest = stored
        if count != self.experts or not rest:
            return None
        if self.packed:
            rows, *groups = rest
            return (groups[0] * SIZE, rows) if groups[1:] == [SIZE // 2] else None
        rows, *columns = rest
        return None if rows % self.parts else (rows // self.parts, *columns)

    def slices(self, stored: Sequence[Any]) -> Any:
        """Return a lazy tensor, of which slices can be read. ``stored`` contains the lazy tensors of the files."""
        if self.expert is None:
            return stored[0]
        return _Packed(*stored, self) if self.packed else _Part(stored[0], self)


class _Part:
    """Slices of one expert's part of a fused tensor."""

    def __init__(self, fused: Any, place: Place):
        self.fused, self.place = fused, place

    def get_shape(self) -> list[int]:
        return list(self.place.shape(self.fused.get_shape()) or ())

    def get_dtype(self) -> str:
        return self.fused.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        count = self.get_shape()[0]
        start, stop, step = rows.indices(count)
        shift = self.place.part * count
        return self.fused[(self.place.expert, slice(start + shift, stop + shift, step), *rest)]


class _Packed:
    """Slices of one expert's matrix. The files contain the transposed matrix, whose rows are quantized in groups."""

    def __init__(self, blocks: Any, scales: Any, place: Place):
        self.blocks, self.scales, self.place = blocks, scales, place

    def get_shape(self) -> list[int]:
        return list(self.place.shape(self.blocks.get_shape()) or ())

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        parts = (part[self.place.expert, columns] for part in (self.blocks, self.scales))
        return dequantized(*parts).T[rows]


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values of a matrix in MXFP4, which are exact unless they are too large for bf16.

    blocks   [..., g, 16]  uint8, two values per byte
    scales   [..., g]      uint8, exponents of two, plus 127
    Returns  [..., 32 g]   bf16
    """
    values = PAIRS[blocks.long()].flatten(-2)  # [..., g, 32]
    values = values.masked_fill((scales == NAN)[..., None], torch.nan)
    return torch.ldexp(values, (scales.int() - 127)[..., None]).bfloat16().flatten(-2)


def fused_of(arch: Architecture) -> tuple[Fused, ...]:
    """Return the alternative forms in which checkpoints of a family can store the tensors of a layer with experts."""
    return getattr(FAMILIES[arch.model_type], "fused", ())


def places_of(arch: Architecture, names: Collection[str]) -> dict[str, Place]:
    """Return the places of the weight table's tensors that the files do not contain under their own names.

    names   names of the tensors in the files
    """
    found, known = {}, set(names)
    for fused in fused_of(arch):
        for layer in arch.layers("experts"):
            tensor = fused.tensor.format(l=layer, e=0)
            packed = tensor not in known and getattr(FAMILIES[arch.model_type], "packed", None) is not None
            if not ({tensor + BLOCKS, tensor + SCALES} if packed else {tensor}) <= known:
                continue
            own = {}
            for part, name in enumerate(fused.parts):
                experts = range(arch.experts.count) if "{e}" in name else (None,)
                for expert in experts:
                    facts = (tensor, expert, part, len(fused.parts), packed, arch.experts.count)
                    own[name.format(l=layer, e=expert)] = Place(*facts)
            if not own.keys() & known:  # otherwise, the tensors of single experts are read, not the fused tensor
                found |= own
    return found


def written_as(arch: Architecture) -> dict[str, str]:
    """Return the names of the fused tensors that exports contain, by the names of their parts in the weight table."""
    return {
        part.format(l=layer, e=expert): fused.tensor.format(l=layer)
        for fused in fused_of(arch)
        if fused.written
        for part in fused.parts
        for layer in arch.layers("experts")
        for expert in range(arch.experts.count)
    }


def exported_names(arch: Architecture) -> set[str]:
    """Return the names of all tensors that an export of ``arch`` contains."""
    other = written_as(arch)
    return {
        other.get(tensor.name, tensor.name) for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch)
    }
