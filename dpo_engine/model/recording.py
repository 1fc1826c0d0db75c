"""Record a part of a layer's work as two CUDA graphs, one for its forward pass and one for its backward pass.

A recording is a list of kernels with their arguments. A replay starts all kernels with one call, and runs no Python
code. The kernels use the same memory as during the recording. :class:`Piece` makes a part of a layer's work usable in
autograd. Such a part can have parameters. The memory of pieces follows three rules.

Inputs. Before each forward pass, the caller copies the inputs to tensors that never move.

Activations. Memory that is freed while a recording is made is used again by later recordings of the same pool. If all
pieces that share a pool run in the order in which they were recorded, no piece reads such memory after another piece
has overwritten it. This order does not protect the tensors that a forward pass saves for its backward pass. Autograd
frees these tensors as soon as the backward pass has been recorded, although every replay of the backward pass reads
them. Therefore, a piece adds references to all saved tensors to ``kept``, a list from its caller.

Gradients. All backward passes of a model chunk share one pool, and the buffers of :class:`SharedMemory`. The contents
of both are valid only until the next backward pass begins. Gradients of inputs are copied out after each replay.
Gradients of parameters are added to DDP's ``main_grad`` by the recording itself.

Not covered. A part must not wait for the device, depend on numbers in host memory, or have hooks on the gradients of
its parameters. Such hooks would run once, during the recording, and their kernels would be recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recording:
    """Recorded work on the current stream, which must not be the default stream.

    Creating this object runs the Python code of the work, but its kernels are only recorded. :meth:`replay` runs the
    kernels.

    work    function that does the work
    pool    memory from which the work allocates, from :func:`new_pool`
    result  what ``work`` returned
    """

    def __init__(self, work: Callable[[], Any], pool: Any):
        self._graph = torch.cuda.CUDAGraph()
        # Autograd and NCCL have threads of their own, which may call CUDA during the recording.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self.result = work()
        except BaseException:
            with suppress(RuntimeError):  # an error of the incomplete recording would hide the error of the work
                self._graph.capture_end()
            raise
        self._graph.capture_end()

    def replay(self) -> None:
        """Run the recorded kernels."""
        self._graph.replay()

    def reset(self) -> None:
        """Free the recording. It cannot be replayed afterwards."""
        self._graph.reset()


def new_pool() -> Any:
    """Return a pool of device memory for recordings.

    Torch cannot take memory from its cache during a recording, so the cache is emptied first.
    """
    torch.cuda.empty_cache()
    return torch.cuda.graph_pool_handle()


class SharedMemory:
    """Memory that the backward passes of all pieces of a chunk use in turn.

    pool   pool of the recordings of all these passes
    """

    def __init__(self) -> None:
        self.pool = new_pool()
        self._buffers: dict[Any, Tensor] = {}

    def buffers(self, use: str, like: Sequence[Tensor]) -> list[Tensor]:
        """Return a buffer for each tensor in ``like``, of the same shape, strides and dtype.

        Calls with the same ``use`` return the same buffers; calls with different uses return different buffers.
        """
        counts: Counter[Any] = Counter()
        found = []
        for tensor in like:
            size = (use, tensor.shape, tensor.stride(), tensor.dtype)
            key = (*size, counts[size])
            counts[size] += 1
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(tensor, requires_grad=False)
            found.append(self._buffers[key])
        return found


def saved_tensors(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return everything that autograd saved for the backward pass of ``outputs``.

    Hooks for saved tensors would be simpler, but they replace weights by tensors without Megatron's attributes.
    """
    found: list[Any] = []
    seen: set[Any] = set()
    left = [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        found += getattr(node, "saved_tensors", ())  # of functions that are written in Python
        left += [following for following, _ in node.next_functions]
    flat = [one for value in found for one in (value if isinstance(value, tuple | list) else (value,))]
    return [one.detach() for one in flat if isinstance(one, Tensor)]


class Piece:
    """A part of a layer's work, as a function that autograd can differentiate; its arguments are tensors.

    work        function that computes a tuple of tensors from ``inputs``
    inputs      tensors that never move, from which the forward pass reads
    parameters  parameters that the work can use, with DDP's attributes
    pool        pool of the forward pass
    kept        list to which this class adds all tensors that the forward pass saves for the backward pass. Otherwise,
                Transformer Engine would free them during the backward pass, or autograd would free them afterwards
    shared      memory of the backward pass

    outputs     results of the forward pass. A replay overwrites them
    after       called after each backward pass
    """

    def __init__(
        self,
        work: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        pool: Any,
        kept: list[Tensor],
        shared: SharedMemory,
    ):
        with torch.enable_grad():
            self.forward = Recording(lambda: work(*inputs), pool)
        self.outputs: tuple[Tensor, ...] = self.forward.result
        self.after: Callable[[], None] = lambda: None
        self.backward: Recording | None = None
        self._inputs, self._reached = inputs, []
        if any(output.requires_grad for output in self.outputs):
            kept += saved_tensors(self.outputs)
            self._record_backward(parameters, shared)

    def _record_backward(self, parameters: Sequence[nn.Parameter], shared: SharedMemory) -> None:
        outputs = [output for output in self.outputs if output.requires_grad]
        inputs = [tensor for tensor in self._inputs if tensor.requires_grad]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._arriving, self._leaving = shared.buffers("arriving", outputs), shared.buffers("leaving", inputs)
        marks = [parameter.grad_added_to_main_grad for parameter in trained]
        for parameter in trained:
            parameter.grad_added_to_main_grad = False

        def work() -> list[nn.Parameter]:
            found = torch.autograd.grad(outputs, [*inputs, *trained], self._arriving, allow_unused=True)
            for place, gradient in zip(self._leaving, found, strict=False):
                place.zero_() if gradient is None else place.copy_(gradient)
            reached = []
            for parameter, gradient in zip(trained, found[len(inputs) :], strict=True):
                if gradient is not None:
                    reached.append(parameter)
                    if not parameter.grad_added_to_main_grad:  # some linear layers have added it themselves
                        parameter.main_grad.add_(gradient)
            return reached

        self.backward = Recording(work, shared.pool)
        self._reached = self.backward.result
        for parameter, mark in zip(trained, marks, strict=True):
            parameter.grad_added_to_main_grad = mark

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs. The caller must first copy the inputs to the tensors from which the forward pass reads.

        given   the same values as the inputs, with the history that autograd needs
        """
        return _Replay.apply(self, *given, *self._reached)

    def gradients(self, arriving: Sequence[Tensor]) -> list[Tensor | None]:
        """Run the backward pass. Return a gradient for each input, and one for each parameter that the pass reaches.

        For an input that does not require a gradient, None is returned. A parameter's gradient is already in
        ``main_grad``, and the tensor returned for it is never read. It is returned because DDP's hooks, which start
        reductions, are called only if autograd gets a gradient.
        """
        needed = [one for one, output in zip(arriving, self.outputs, strict=True) if output.requires_grad]
        for place, gradient in zip(self._arriving, needed, strict=True):
            place.copy_(gradient)
        self.backward.replay()
        leaving = iter(self._leaving)
        found = [next(leaving).clone() if tensor.requires_grad else None for tensor in self._inputs]
        for parameter in self._reached:
            parameter.grad_added_to_main_grad = True
            found.append(parameter.detach())
        self.after()
        return found

    def reset(self) -> None:
        """Free the recordings."""
        for recording in filter(None, (self.forward, self.backward)):
            recording.reset()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Piece, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.piece = piece
        piece.forward.replay()
        found = tuple(output.detach() for output in piece.outputs)
        constant = (one for one, output in zip(found, piece.outputs, strict=True) if not output.requires_grad)
        ctx.mark_non_differentiable(*constant)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.piece.gradients(arriving)
