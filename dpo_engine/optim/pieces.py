"""Update weights with AdamW in pieces, so that only a part of the bf16 gradients is copied to fp32 at a time.

Megatron converts all gradients to fp32 before an update. The fp32 gradients take 4 more bytes for each parameter that a
rank owns, at a moment when weights, gradients and states are all in memory. This module divides the parameters that a
rank owns into pieces of at most `PIECE` elements. For one piece after the other, the gradients are converted, and
torch's fused AdamW updates the piece. At the end, the new weights are copied to the model. The results equal those of
one fused update of all elements.
:mod:`~dpo_engine.optim.host_states` keeps the states in host memory and works in the same pieces.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.optim.adamw import adamw

from dpo_engine.model.memory import PIECE

MOMENTS = ("exp_avg", "exp_avg_sq")


class Slice(NamedTuple):
    """The slice of a parameter that this rank updates.

    device   the tensor of this slice in Megatron's parameter groups; its ``grad`` is the slice's gradient. For a bf16
             parameter, the tensor has the slice's shape and the dtype of the gradients, but only one element of memory
    weights  flat view of this slice in the model's parameter
    main     main weights of this slice in fp32, flat. If the model's weights are in fp32 and the states are on the
             device, this tensor has the same memory as ``weights``
    """

    device: Tensor
    weights: Tensor
    main: Tensor


class Part(NamedTuple):
    """The elements ``own`` of a slice. In the buffer of their piece, their gradients occupy the range ``place``.

    If the states are in host memory, the elements' new weights are written to the same range of another buffer.
    """

    whole: Slice
    own: slice
    place: slice


class PiecewiseAdamW:
    """AdamW that replaces the torch optimizer inside Megatron's distributed optimizer.

    on_host       whether the main weights and moments are in host memory; the main weights are then always copies
    param_groups  groups of the replaced optimizer. Megatron's schedule writes their learning rates. The item ``step``
                  of a group is the number of updates
    state         moments; the key is the tensor of main weights
    mains         main weights; the key is the slice's tensor in ``param_groups``
    factor        number by which the next update multiplies the gradients, as a tensor on the device; None means that
                  the gradients are not multiplied
    """

    on_host = False

    def __init__(self, optimizer: DistributedOptimizer):
        self.param_groups: list[dict[str, Any]] = optimizer.optimizer.param_groups
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.mains: dict[Tensor, Tensor] = {}
        self.factor: Tensor | None = None
        self._owned: list[tuple[Tensor, Tensor, slice]] = []
        slices: list[list[Slice]] = [[] for _ in self.param_groups]
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            span = optimizer._get_model_param_range_map(parameter)["param"]
            device, own = self.param_groups[group]["params"][order], slice(span.start, span.end)
            weights = main = parameter.detach().view(-1)[own]
            if self.on_host or weights.dtype is not torch.float32:
                where = "cpu" if self.on_host else weights.device
                main = torch.empty(len(weights), dtype=torch.float32, device=where).copy_(weights)
            self.state[main] = {name: torch.zeros_like(main) for name in MOMENTS}
            self.mains[device] = main
            if parameter.dtype is not torch.float32:  # for fp32, `device` stays a view of the model's weights
                one = torch.zeros((), dtype=parameter.main_grad.dtype, device=weights.device)
                device.data = one.expand(len(weights))
            self._owned.append((device, parameter, own))
            slices[group].append(Slice(device, weights, main))
        self._pieces = [(group, piece) for group, found in enumerate(slices) for piece in _divide(found)]
        self._size = min(PIECE, max((piece[-1].place.stop for _, piece in self._pieces), default=0))
        self._open_buffers(torch.device(torch.cuda.current_device()))

    def _open_buffers(self, device: torch.device) -> None:
        self._gradients = torch.empty(self._size, dtype=torch.float32, device=device)

    def take_gradients(self) -> None:
        """Set the gradient of each slice, in the dtype in which the gradients were summed.

        Megatron's own method, which this method replaces, converts the gradients to fp32.
        """
        for device, parameter, own in self._owned:
            device.grad = parameter.main_grad.view(-1)[own]

    @torch.no_grad()
    def step(self) -> None:
        """Update the main weights and moments, and copy the new weights to the model. Gradients do not change."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        self._update_all()
        self.factor = None

    def _update_all(self) -> None:
        for group, piece in self._pieces:
            self._gather(piece, self._gradients)
            self._update(self.param_groups[group], piece, self._gradients)
        self.write_weights()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Copy the main weights to the model."""
        for _, piece in self._pieces:
            for (_, weights, main), own, _ in piece:
                weights[own].copy_(main[own])

    @torch.no_grad()
    def read_weights(self, state_dict: None = None) -> None:
        """Copy the model's weights to the main weights."""
        for _, piece in self._pieces:
            for (_, weights, main), own, _ in piece:
                main[own].copy_(weights[own])

    def _gather(self, piece: list[Part], buffer: Tensor) -> slice:
        """Copy the gradients of a piece to a buffer on the device and scale them. Return the buffer's used range."""
        for (device, *_), own, place in piece:
            buffer[place].copy_(device.grad[own])
        used = slice(0, piece[-1].place.stop)
        if self.factor is not None:
            buffer[used].mul_(self.factor)
        return used

    def _update(self, group: dict[str, Any], piece: list[Part], gradients: Tensor) -> None:
        adamw(
            [part.whole.main[part.own] for part in piece],
            [gradients[part.place] for part in piece],
            *([self.state[part.whole.main][name][part.own] for part in piece] for name in MOMENTS),
            [],
            # adamw adds 1 to each step count, and expects the counts on the device of the weights
            list(torch.full((len(piece),), group["step"] - 1.0, device=gradients.device).unbind()),
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


def update_in_pieces(optimizer: Any, kind: type[PiecewiseAdamW]) -> None:
    """Replace the torch optimizer inside each of Megatron's distributed optimizers with an instance of ``kind``.

    Megatron must have built its distributed optimizers without main weights.
    """
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        single.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
        if single.is_stub_optimizer:  # all parameters of this rank are frozen
            continue
        inner = kind(single)
        single.optimizer = inner
        single._copy_model_grads_to_main_grads = inner.take_gradients
        single._copy_model_params_to_main_params = inner.read_weights
        single._copy_main_params_to_model_params = _already_written


def _already_written() -> None:
    """Do nothing: `PiecewiseAdamW.step` has already copied the main weights to the model."""


def _divide(slices: list[Slice]) -> Iterator[list[Part]]:
    """Divide slices into pieces of at most `PIECE` elements."""
    piece: list[Part] = []
    filled = 0
    for whole in slices:
        start = 0
        while start < len(whole.main):
            count = min(len(whole.main) - start, PIECE - filled)
            piece.append(Part(whole, slice(start, start + count), slice(filled, filled + count)))
            start, filled = start + count, filled + count
            if filled == PIECE:
                yield piece
                piece, filled = [], 0
    if piece:
        yield piece
