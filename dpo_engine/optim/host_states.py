"""Keep AdamW's states in host memory: the fp32 main weights and both moments (``optim.states: host``).

The device keeps weights and gradients. An update handles pieces of `PIECE` elements. While the host updates one piece,
the gradients of the next one are copied to it, and the weights of the one before are copied back. Only the buffers of
these copies are page-locked. The update itself is torch's fused AdamW for CPUs. All of this also runs without a GPU,
where the device's memory is host memory, too.

Megatron's HybridDeviceOptimizer is not used. It moves only tensors of a GPU, so neither its numbers nor its checkpoints
could be tested without one. By default, it also page-locks memory for all gradients and has an optimizer for each
parameter.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

from dpo_engine.config.sections import OptimConfig
from dpo_engine.data.workers import cores
from dpo_engine.model.memory import PIECE

MOMENTS = ("exp_avg", "exp_avg_sq")


class Slice(NamedTuple):
    """A slice of a parameter, which this rank updates.

    device   the tensor that Megatron would update, whose ``grad`` is the gradient. For a bf16 parameter, it has the
             slice's shape and the dtype of gradients, but only one element of memory
    weights  view of the model's parameter, flat
    host     main weights in fp32, flat
    """

    device: Tensor
    weights: Tensor
    host: Tensor


class Part(NamedTuple):
    """Elements ``own`` of a slice, which are at ``place`` in the buffers of copies."""

    whole: Slice
    own: slice
    place: slice


class HostAdamW:
    """AdamW on the host, in the place of the torch optimizer inside a distributed optimizer of Megatron.

    param_groups  groups of the replaced optimizer. Megatron's schedule writes their learning rates; ``step`` is the
                  number of updates
    state         moments, by the main weights on the host
    hosts         main weights on the host, by the tensor that Megatron would update
    factor        factor of the gradients in the next update, on the device; None: 1
    """

    def __init__(self, optimizer: DistributedOptimizer):
        self.param_groups: list[dict[str, Any]] = optimizer.optimizer.param_groups
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.hosts: dict[Tensor, Tensor] = {}
        self.factor: Tensor | None = None
        self._owned: list[tuple[Tensor, Tensor, slice]] = []
        slices: list[list[Slice]] = [[] for _ in self.param_groups]
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            span = optimizer._get_model_param_range_map(parameter)["param"]
            device, own = self.param_groups[group]["params"][order], slice(span.start, span.end)
            weights = parameter.detach().view(-1)[own]
            host = torch.empty(len(weights), dtype=torch.float32, device="cpu").copy_(weights)
            self.state[host] = {name: torch.zeros_like(host) for name in MOMENTS}
            self.hosts[device] = host
            if parameter.dtype is not torch.float32:  # else, these are the model's weights
                one = torch.zeros((), dtype=parameter.main_grad.dtype, device=weights.device)
                device.data = one.expand(len(weights))
            self._owned.append((device, parameter, own))
            slices[group].append(Slice(device, weights, host))
        self._pieces = [(group, piece) for group, found in enumerate(slices) for piece in _divide(found)]
        size = min(PIECE, max((piece[-1].place.stop for _, piece in self._pieces), default=0))
        on_device = torch.device(torch.cuda.current_device())
        self._threads = update_threads(gpu=on_device.type == "cuda")

        def buffers(**where: Any) -> list[Tensor]:
            return [torch.empty(size, dtype=torch.float32, **where) for _ in range(2)]

        locked = {"device": "cpu", "pin_memory": on_device.type == "cuda"}
        self._scaled, self._received, self._sent = buffers(device=on_device), buffers(**locked), buffers(**locked)
        self._out, self._back = torch.cuda.Stream(), torch.cuda.Stream()
        self._free = [self._back.record_event() for _ in range(2)]  # when each buffer of weights is copied

    def take_gradients(self) -> None:
        """Set the gradient of each slice, in the dtype in which it was summed. Megatron would convert it to fp32."""
        for device, parameter, own in self._owned:
            device.grad = parameter.main_grad.view(-1)[own]

    @torch.no_grad()
    def step(self) -> None:
        """Update the main weights and moments, and copy the new weights to the model. Gradients do not change."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        self._out.wait_stream(torch.cuda.current_stream())
        arriving = self._fetch(0)
        with _threads(self._threads):
            for number, (group, piece) in enumerate(self._pieces):
                arrived, arriving = arriving, self._fetch(number + 1)
                arrived.synchronize()
                self._update(self.param_groups[group], piece, self._received[number % 2])
                self._send(number)
        self.factor = None
        torch.cuda.current_stream().wait_stream(self._back)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Copy the main weights to the model."""
        with _threads(self._threads):
            for number in range(len(self._pieces)):
                self._send(number)
        torch.cuda.current_stream().wait_stream(self._back)

    @torch.no_grad()
    def read_weights(self, state_dict: None = None) -> None:
        """Copy the model's weights to the main weights."""
        for _, piece in self._pieces:
            for (_, weights, host), own, _ in piece:
                host[own].copy_(weights[own])

    def _fetch(self, number: int) -> Any:
        """Start to copy the gradients of a piece to the host, scaled. Return the event of their arrival."""
        if number == len(self._pieces):
            return None
        scaled, received, piece = self._scaled[number % 2], self._received[number % 2], self._pieces[number][1]
        with torch.cuda.stream(self._out):
            for (device, *_), own, place in piece:
                scaled[place].copy_(device.grad[own])
            used = slice(0, piece[-1].place.stop)
            if self.factor is not None:
                scaled[used].mul_(self.factor)
            received[used].copy_(scaled[used], non_blocking=True)
            return self._out.record_event()

    def _update(self, group: dict[str, Any], piece: list[Part], gradients: Tensor) -> None:
        adamw(
            [part.whole.host[part.own] for part in piece],
            [gradients[part.place] for part in piece],
            *([self.state[part.whole.host][name][part.own] for part in piece] for name in MOMENTS),
            [],
            [torch.tensor(float(group["step"] - 1)) for _ in piece],  # adamw adds 1
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _send(self, number: int) -> None:
        """Start to copy the main weights of a piece to the model, in the model's dtype."""
        buffer, piece = self._sent[number % 2], self._pieces[number][1]
        self._free[number % 2].synchronize()
        if number == 0:  # the model may still be reading its weights
            self._back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._back):
            for (_, weights, host), own, place in piece:
                rounded = buffer[place].view(weights.dtype)[: own.stop - own.start]
                rounded.copy_(host[own])
                weights[own].copy_(rounded, non_blocking=True)
            self._free[number % 2] = self._back.record_event()


def keep_on_host(optimizer: Any) -> None:
    """Replace the optimizers inside Megatron's distributed optimizers, which were built without main weights."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        single.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
        if single.is_stub_optimizer:  # all parameters of this rank are frozen
            continue
        inner = HostAdamW(single)
        single.optimizer = inner
        single._copy_model_grads_to_main_grads = inner.take_gradients
        single._copy_model_params_to_main_params = inner.read_weights
        single._copy_main_params_to_model_params = _already_written


def _already_written() -> None:
    """Do nothing: `HostAdamW.step` has already copied the main weights to the model."""


def _divide(slices: list[Slice]) -> Iterator[list[Part]]:
    """Divide slices into pieces of at most `PIECE` elements."""
    piece: list[Part] = []
    filled = 0
    for whole in slices:
        start = 0
        while start < len(whole.host):
            count = min(len(whole.host) - start, PIECE - filled)
            piece.append(Part(whole, slice(start, start + count), slice(filled, filled + count)))
            start, filled = start + count, filled + count
            if filled == PIECE:
                yield piece
                piece, filled = [], 0
    if piece:
        yield piece


def update_threads(*, gpu: bool) -> int:
    """Return the number of threads for an update on the host.

    Without a GPU, this is the number of threads of all other operations. With one, it is OMP_NUM_THREADS, unless that
    is 1, to which torchrun sets it. Otherwise it is the number of cores that this process may use, divided by the
    number of GPUs if other ranks of the node may use the same cores.
    """
    asked, own = torch.get_num_threads(), cores()
    if not gpu or ("OMP_NUM_THREADS" in os.environ and asked > 1):
        return asked
    shared = own == os.cpu_count()
    return max(1, own // torch.cuda.device_count() if shared else own)


def update_lines(optim: OptimConfig, *, gpu: bool) -> list[str]:
    """Return the log's line about updates on the host, if there are any."""
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
