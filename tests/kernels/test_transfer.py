"""Tests of packing host tensors into one buffer, and of unpacking them."""

import torch

from dpo_kernels.transfer import ALIGNMENT, pack, to_device, unpack

TENSORS = [
    torch.tensor([[True, False, True]]),
    torch.tensor([1, -2, 3], dtype=torch.int64),
    torch.empty((0, 2), dtype=torch.float32),
    torch.tensor(0.5),
    torch.arange(6, dtype=torch.int32).view(2, 3),
    torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
]


def test_unpacked_tensors_equal_the_packed_ones():
    packed, places = pack(TENSORS)
    assert all(place % ALIGNMENT == 0 for place in places)
    for found, tensor in zip(unpack(packed, TENSORS, places), TENSORS, strict=True):
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)


def test_host_tensors_are_not_copied_to_the_host():
    assert all(found is tensor for found, tensor in zip(to_device(TENSORS, "cpu"), TENSORS, strict=True))
