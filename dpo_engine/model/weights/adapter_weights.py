"""Load the weights of adapters, collect them, and merge them into the weights of the model."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.errors import NumbersError
from dpo_engine.model.adaptation import PARTS, PREFIX, Adaptation, adapter_shapes, peft_tensors
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.load import Files, fill_parameter
from dpo_engine.model.weights.peft import AdapterFiles
from dpo_engine.model.weights.save import assemble, gather_shards
from dpo_engine.model.weights.table import placed_parameters
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups

NEGLIGIBLE = 0.005
"""Rounding errors of a merge cause no warning if they are below this share of the adapter's contribution."""


def drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw the matrix ``A`` of a new adapter as PEFT does: uniform within ``+-1 / sqrt(columns)``, fp32.

    The values depend only on the tensor's name, its shape and the seed, so they are the same in all layouts.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


class DrawnAdapter:
    """The tensors of a randomly drawn adapter, with the interface of :class:`~dpo_engine.model.weights.load.Files`.

    shapes   names and shapes of all its tensors
    scale    factor of the drawn matrices ``B``; with 0, the adapter changes nothing
    """

    where = "a new adapter"

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int, scale: float):
        self.shapes, self.seed, self.scale = shapes, seed, scale
        self.file_of: Mapping[str, str] = dict.fromkeys(shapes, "")

    def slices(self, names: Sequence[str]) -> list[Tensor]:
        return [
            drawn(name, self.shapes[name], self.seed) * (self.scale if name.endswith(PARTS["B"]) else 1.0)
            for name in names
        ]


@torch.no_grad()
def load_adapters(
    chunks: Sequence[nn.Module], adaptation: Adaptation, arch: Architecture, directory: str, *, groups: ParallelGroups
) -> None:
    """Load the PEFT adapter in ``directory`` into this rank's attached adapters.

    *Collectives* over world: all-gathers of objects. Reading has no time limit.
    Raises :class:`~dpo_engine.errors.ConfigError` on all ranks if the adapter cannot be read or does not fit the model;
    :class:`~dpo_engine.errors.NumbersError` if a value is not finite.
    """

    def read() -> None:
        files = AdapterFiles(directory)
        files.check(adaptation, arch)
        _fill(chunks, files, arch, groups, tuple(PARTS))

    without_time_limit(groups.world, read, Meter("reading adapter.path"))


def draw_adapters(
    chunks: Sequence[nn.Module],
    adaptation: Adaptation,
    arch: Architecture,
    *,
    groups: ParallelGroups,
    seed: int,
    scale: float = 0.0,
) -> None:
    """Draw the matrices ``A`` and ``B`` of this rank's adapters. The values do not depend on the layout.

    scale   factor of ``B``. With 0, the adapters change nothing, as at the start of a run
    """
    _fill(chunks, DrawnAdapter(peft_tensors(adaptation, arch), seed, scale), arch, groups, ("A", "B"))


@torch.no_grad()
def _fill(
    chunks: Sequence[nn.Module], files: Files, arch: Architecture, groups: ParallelGroups, parts: Sequence[str]
) -> None:
    ends = tuple(PARTS[part] for part in parts)
    for placed in placed_parameters(chunks, arch, groups):
        if placed.rule.adapter and placed.rule.tensors[0].endswith(ends):
            fill_parameter(placed, files, arch)


@torch.no_grad()
def stage_adapters(chunks: Sequence[nn.Module], arch: Architecture, groups: ParallelGroups) -> dict[str, Tensor]:
    """Return the complete tensors of this stage's adapters, by their names in a PEFT adapter, in CPU memory.

    Only one rank of the stage, with tp, dp and cp rank 0, returns tensors. The other ranks return an empty dictionary.

    *Collectives* on the ranks with dp and cp rank 0: one gather over tp for each sharded parameter of an adapter.
    Raises :class:`~dpo_engine.errors.NumbersError` on the rank that returns tensors, after all gathers, if a value is
    not finite.
    """
    found: dict[str, Tensor] = {}
    if groups.dp_cp.rank() != 0:
        return found
    failure = None
    for placed in placed_parameters(chunks, arch, groups):
        if placed.rule.adapter:
            parts = gather_shards(placed)
            if groups.tp.rank() == 0 and failure is None:
                dtype = placed.parameter.dtype
                try:
                    found |= assemble(placed, parts, arch, defaultdict(lambda dtype=dtype: dtype))
                except NumbersError as error:  # the other ranks still take part in the remaining gathers
                    failure = error
    if failure is not None:
        raise failure
    return found


class Merge:
    """A function that merges adapters into complete weights, one tensor at a time, in PEFT's order of operations.

    tensors  the complete tensors of this stage's adapters, from :func:`stage_adapters`

    The result is computed in the dtype of the adapter (fp32 or wider) and rounded once, so it does not depend on the
    layout, and equals PEFT's ``merge_and_unload`` bit by bit.
    """

    def __init__(self, adaptation: Adaptation, arch: Architecture, tensors: Mapping[str, Tensor]):
        self.shapes = adapter_shapes(adaptation, arch)
        self.tensors = tensors
        self._changed = self._lost = 0.0  # sums of squares

    @torch.no_grad()
    def __call__(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``weight``, merged with the adapter of tensor ``name`` if there is one, and rounded to ``dtype``."""
        projection = name.removesuffix(".weight")
        shape = self.shapes.get(projection) if name.endswith(".weight") else None
        if shape is None:
            return weight.to(dtype)

        def part(kind: str) -> Tensor | None:
            return self.tensors.get(PREFIX + projection + PARTS[kind])

        down, up, magnitude = part("A"), part("B"), part("magnitude")
        weight = weight.to(down.dtype)
        merged = weight + (up @ down) * shape.scale
        if magnitude is not None:
            merged = (magnitude / torch.linalg.norm(merged, dim=1))[:, None] * merged
        rounded = merged.to(dtype)
        self._changed += float((merged - weight).double().square().sum())
        self._lost += float((rounded.to(merged.dtype) - merged).double().square().sum())
        return rounded

    def rounding(self, group: dist.ProcessGroup) -> str:
        """Return a sentence about the share of the adapters' contribution that is lost when merged weights are rounded.

        The contribution is the difference between the merged weights, before they are rounded, and the base weights.
        The lost share is the norm of all rounding errors, divided by the norm of the contribution.

        *Collectives*: one all-gather of objects over ``group``.
        """
        sums: list[Any] = [None] * group.size()
        dist.all_gather_object(sums, (self._lost, self._changed), group=group)
        lost, changed = (sum(column) for column in zip(*sums, strict=True))
        error = math.sqrt(lost / changed) if changed else 0.0
        if error < NEGLIGIBLE:
            return "rounding the merged weights loses almost nothing of the adapter's contribution"
        return (
            f"rounding the merged weights changes the adapter's contribution by {error:.0%}; use the adapter itself, "
            "or export with --dtype fp32"
        )
