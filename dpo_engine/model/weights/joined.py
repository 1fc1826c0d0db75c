"""Join the tensors of individual experts, for exports that have one tensor for all experts of a layer."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.model.architecture import Architecture
from dpo_engine.model.families.rule import HFTensor
from dpo_engine.model.weights.fused import fused_of
from dpo_engine.model.weights.table import Placed


def written_fused(placed: Placed, arch: Architecture) -> HFTensor | None:
    """Return the fused tensor that contains a parameter in an export; None if no fused tensor contains it."""
    fused = next((one for one in fused_of(arch) if one.written and one.parts == placed.rule.tensors), None)
    if fused is None:
        return None
    (own,) = placed.tensors(arch)
    return HFTensor(fused.tensor.format(l=placed.layer), (arch.experts.count, *own.shape))


def completed_tensors(placed: Placed, arch: Architecture) -> list[HFTensor]:
    """Return the exported tensors that are complete once ``placed`` is added. A rank adds its parameters in order."""
    fused = written_fused(placed, arch)
    if fused is None:
        return placed.tensors(arch)
    return [fused] if (placed.expert + 1) % (arch.experts.count // placed.owners.size()) == 0 else []


def gather_experts(placed: Placed, arch: Architecture) -> Iterator[tuple[Placed, list[Tensor]]]:
    """Gather and yield the parameter of one expert from each expert-parallel rank.

    On every rank, ``placed`` belongs to the expert with the same index among the rank's own experts. Of all ranks that
    own experts of the layer, only the first rank yields parameters. It yields each parameter with all shards of the
    parameter.

    *Collectives*: a gather over ep and, on the first rank of each ep group, a gather over expt_tp.
    """
    own = gather_on_first(placed.parameter.detach(), placed.owners)
    if not own:
        return
    parts = gather_on_first(torch.stack(own), placed.shards)
    for rank in range(placed.owners.size() if parts else 0):
        expert = placed.expert + rank * arch.experts.count // placed.owners.size()
        yield placed._replace(expert=expert), [part[rank] for part in parts]


def gather_on_first(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """On the first rank of ``group``, return the tensors of all its ranks. On other ranks, return an empty list.

    *Collectives*: one gather over ``group``, if it has several ranks.
    """
    tensor = tensor.contiguous()
    if group.size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(tensor, parts, group=group, group_dst=0)
    return parts or []


class Joined:
    """Fused tensors of an export that are not complete yet, on the rank that gathers them."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Tensor, set[int]]] = {}

    def add(self, fused: HFTensor, expert: int, tensor: Tensor) -> Mapping[str, Tensor]:
        """Add an expert's tensor. Return the fused tensor by its name if it is complete, else an empty mapping."""
        if fused.name not in self._held:
            self._held[fused.name] = torch.empty(fused.shape, dtype=tensor.dtype), set()
        whole, experts = self._held[fused.name]
        whole[expert] = tensor
        experts.add(expert)
        if len(experts) < len(whole):
            return {}
        return {fused.name: self._held.pop(fused.name)[0]}
