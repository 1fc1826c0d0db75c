"""Copy small arrays from host memory to a device without making the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Each tensor starts at a multiple of this many bytes, which suffices for every dtype and for vectorized loads."""


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return copies of contiguous host tensors on a device; on the CPU, return the tensors themselves.

    On a GPU, all of them are copied from one page-locked buffer in one transfer. A copy from ordinary memory would
    block the host until the device reaches it.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return list(tensors)
    packed, places = pack(tensors, pinned=kind == "cuda")
    return unpack(packed.to(device, non_blocking=True), tensors, places)


def pack(tensors: Sequence[Tensor], *, pinned: bool = False) -> tuple[Tensor, list[int]]:
    """Copy tensors into one buffer of bytes. Return the buffer, and where each tensor starts in it."""
    places, size = [], 0
    for tensor in tensors:
        places.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for tensor, view in zip(tensors, unpack(packed, tensors, places), strict=True):
        view.copy_(tensor)
    return packed, places


def unpack(packed: Tensor, tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Return views of a buffer that :func:`pack` laid out, with the dtypes and shapes of ``tensors``."""
    return [
        packed[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, tensors, strict=True)
    ]
