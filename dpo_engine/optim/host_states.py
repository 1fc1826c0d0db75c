"""Keep AdamW's states in host memory: the fp32 main weights and both moments (``optim.states: host``).

The device keeps weights and gradients. An update works in pieces (:mod:`~dpo_engine.optim.pieces`). While the host
updates one piece, the gradients of the next piece are copied to the host, and the new weights of the previous piece are
copied back to the device. Only the buffers of these copies are page-locked. The update itself is torch's fused AdamW
for CPUs. This module also works without a GPU; the device's memory is then host memory, too.

Megatron's HybridDeviceOptimizer is not used. It moves only tensors that are on a GPU, so neither its results nor its
checkpoints could be tested without a GPU. By default, it also page-locks memory for all gradients and creates an
optimizer for each parameter.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpo_engine.config.sections import OptimConfig
from dpo_engine.data.workers import cores
from dpo_engine.optim.pieces import PiecewiseAdamW


class HostAdamW(PiecewiseAdamW):
    """AdamW whose main weights and moments are in host memory."""

    on_host = True

    def _open_buffers(self, device: torch.device) -> None:
        self._threads = update_threads(gpu=device.type == "cuda")

        def buffers(**where: Any) -> list[Tensor]:
            return [torch.empty(self._size, dtype=torch.float32, **where) for _ in range(2)]

        locked = {"device": "cpu", "pin_memory": device.type == "cuda"}
        self._scaled, self._received, self._sent = buffers(device=device), buffers(**locked), buffers(**locked)
        self._out, self._back = torch.cuda.Stream(), torch.cuda.Stream()
        # One event for each buffer in `_sent`; it marks the end of the last copy from this buffer.
        self._free = [self._back.record_event() for _ in range(2)]

    def _update_all(self) -> None:
        self._out.wait_stream(torch.cuda.current_stream())
        arriving = self._fetch(0)
        with _threads(self._threads):
            for number, (group, piece) in enumerate(self._pieces):
                arrived, arriving = arriving, self._fetch(number + 1)
                arrived.synchronize()
                self._update(self.param_groups[group], piece, self._received[number % 2])
                self._send(number)
        torch.cuda.current_stream().wait_stream(self._back)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Copy the main weights to the model."""
        with _threads(self._threads):
            for number in range(len(self._pieces)):
                self._send(number)
        torch.cuda.current_stream().wait_stream(self._back)

    def _fetch(self, number: int) -> Any:
        """Start to copy the scaled gradients of a piece to the host. Return an event that marks their arrival.

        If there is no piece with this number, return None.
        """
        if number == len(self._pieces):
            return None
        scaled, received = self._scaled[number % 2], self._received[number % 2]
        with torch.cuda.stream(self._out):
            used = self._gather(self._pieces[number][1], scaled)
            received[used].copy_(scaled[used], non_blocking=True)
            return self._out.record_event()

    def _send(self, number: int) -> None:
        """Start to copy the main weights of a piece to the model, in the model's dtype."""
        buffer, piece = self._sent[number % 2], self._pieces[number][1]
        self._free[number % 2].synchronize()
        if number == 0:  # the model may still be reading its weights
            self._back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._back):
            for (_, weights, main), own, place in piece:
                rounded = buffer[place].view(weights.dtype)[: own.stop - own.start]
                rounded.copy_(main[own])
                weights[own].copy_(rounded, non_blocking=True)
            self._free[number % 2] = self._back.record_event()


def update_threads(*, gpu: bool) -> int:
    """Return the number of threads for an update on the host.

    Without a GPU, an update uses the same number of threads as torch's other operations. With a GPU, the environment
    variable OMP_NUM_THREADS gives the number if it is greater than 1 (torchrun sets it to 1 by default). Otherwise, the
    update uses one thread for each core that this process may use. If the process may use all cores of the node, the
    other ranks of the node use the same cores, so the number of cores is divided by the number of GPUs.
    """
    asked, own = torch.get_num_threads(), cores()
    if not gpu or ("OMP_NUM_THREADS" in os.environ and asked > 1):
        return asked
    shared = own == os.cpu_count()
    return max(1, own // torch.cuda.device_count() if shared else own)


def update_lines(optim: OptimConfig, *, gpu: bool) -> list[str]:
    """Return a list with one log line about updates on the host. If states are on the device, the list is empty."""
    if optim.states == "device":
        return []
    return [f"optimizer: states in host memory; threads per rank for an update: {update_threads(gpu=gpu)}"]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
