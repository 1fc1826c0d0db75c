"""Fingerprints of tensors: two tensors with equal bits have the same fingerprint, on every device."""

import torch
from torch import Tensor

BLOCK = 1 << 22
FOLD = 0x5851F42D4C957F2D
"""Factor for combining fingerprints, or the sums of a tensor's blocks, into one number."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Hash a tensor's bits into one number, [] int64, with the same result on every device.

    The hash is a sum modulo 2^64, with one term for each element and one for the number of elements. The term of an
    element is the integer value of its bits times an odd pseudorandom factor. The factor depends only on the element's
    position and the number of elements. Integer sums do not depend on the order of additions. Flipping one bit always
    changes the hash. Any other change of the bits almost always changes the hash.
    """
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().reshape(-1).view(size)
    factors = _factors(min(BLOCK, len(bits)), tensor.device)
    total = torch.full((), len(bits), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK].long()
        total = total * FOLD + (block * factors[: len(block)]).sum()
    return total


def _factors(count: int, device: torch.device) -> Tensor:
    """Return odd pseudorandom numbers [count] int64. Every call returns the same sequence."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * (0x9E3779B97F4A7C15 - (1 << 64))
    mixed = (mixed ^ (mixed >> 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    return (mixed ^ (mixed >> 27)) | 1
