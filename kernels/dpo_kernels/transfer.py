"""Copy small arrays from host memory to a device without making the host wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Each tensor starts at a multiple of this many bytes, which suffices for every dtype and for vectorized loads."""


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return copies of contiguous host tensors on a device; on the CPU, return the tensors themselves."""
    return Transfer(tensors, device).run()


class Transfer:
    """A prepared transfer of contiguous host tensors to a device. :meth:`run` starts the transfer.

    All tensors are copied to a GPU from one page-locked buffer in one transfer. A copy from pageable memory would
    block the host until the device has reached the copy. On the CPU, nothing is copied.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device | str):
        """Copy the tensors into the buffer. This does not wait for the device, so a background thread can do it."""
        self.tensors = list(tensors)
        self.device = torch.device(device)
        kind = self.device.type
        self._packed, self._places = (None, []) if kind == "cpu" else pack(tensors, pinned=kind == "cuda")

    def run(self) -> list[Tensor]:
        """Enqueue the transfer on the device's current stream, and return the copies."""
        if self._packed is None:
            return self.tensors
        return unpack(self._packed.to(self.device, non_blocking=True), self.tensors, self._places)


def pack(tensors: Sequence[Tensor], *, pinned: bool = False) -> tuple[Tensor, list[int]]:
    """Copy tensors into one buffer of bytes. Return the buffer, and the offset of each tensor in bytes."""
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
    whole = {dtype: packed.view(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    return [  # only one operation per tensor, because a step has thousands of tensors
        whole[tensor.dtype].as_strided(tensor.shape, tensor.stride(), place // tensor.itemsize)
        for place, tensor in zip(places, tensors, strict=True)
    ]
