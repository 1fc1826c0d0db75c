"""CUDA graphs of layers: one call starts a layer's work before attention, and another call starts the work after it.

Problem. For each layer of a micro-batch, the host starts about 50 operations besides attention, and over 100 with
adapters. With tensor parallelism, adapters or small micro-batches, these operations are so short that the GPU waits for
the host. A CUDA graph is a recording of kernels that is started with one call, but it repeats the same kernels on the
same memory. In the batch layout ``tree``, attention starts different kernels in each micro-batch, so a whole layer
cannot be recorded.

Solution. All micro-batches of a run have the same number of tokens
(:func:`dpo_engine.batching.micro_batches.fixed_row`). Each layer except the last has two pieces
(:class:`~dpo_engine.model.recording.Piece`). The first piece consists of the norm, the projections and the rotation
before attention. The second piece consists of the output projection, the norms and the MLP after attention. Everything
else runs without recordings: attention, the embedding, the output layer, the loss, and the last layer. The last layer
computes outputs only for the tokens that predict a scored token, and the number of these tokens varies.

Several micro-batches in flight. A micro-batch's activations must not change before its backward pass. In a pipeline,
other micro-batches run before this backward pass, so every micro-batch in flight has a :class:`Slot`, which contains
its own recordings of the chunk's layers. A backward pass runs the pieces of a slot in reverse order, so the slot is
free again after the backward pass of its first piece. If no slot is free, another slot is recorded. Forward passes
always run the pieces of a slot in the same order, because :mod:`~dpo_engine.model.recording` requires this.

Stream. The whole run uses a stream of its own, because the default stream cannot be recorded
(:func:`dpo_engine.platform.device.open_platform`).

Hooks. A replay runs no hooks of modules. Adapters add their results in hooks. These hooks run while a piece is
recorded, so the recording contains their work. Before forward passes, hooks of DDP wait until the weights are gathered.
These hooks do not run in a replay, so :attr:`ChunkGraphs.await_weights` waits for the weights before each layer. DDP's
hooks for gradients are called by autograd, as without graphs.

Which passes. From the second step of a process, the forward and backward passes of training use recordings. In the
first step, Triton compiles and libraries initialize, so nothing is recorded. Other passes (reference, evaluations,
scoring for coupled losses) never use recordings: they start the same kernels one by one.

Not covered. Experts, latent attention, FP8, recomputation, ``tp_comm_overlap``, models with one layer, and batch
layouts other than ``tree`` are refused. No test has replayed a recording on a GPU. Instead, tests on CPUs repeat
recorded operations of torch on the same memory. Where a GPU could have put other values into this memory, the tests
write NaN (``tests/support/recorded_operations.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dpo_engine.config.run import Config
from dpo_engine.model import recording
from dpo_engine.model.architecture import Architecture
from dpo_engine.platform.dims import ParallelDims


def graph_problems(config: Config, arch: Architecture) -> list[str]:
    """List the reasons why the layers of a model cannot have CUDA graphs, whatever the machine."""
    if not config.model.cuda_graphs:
        return []
    reasons = {
        "the number of tokens of an expert is different in every micro-batch": arch.experts,
        "latent attention has never been tested with graphs": arch.latent,
        "the model has one layer, and the last layer has no graphs, because the number of tokens that it computes "
        "varies": arch.num_layers == 1,
    }
    return [f"model.cuda_graphs=true: {why}; remove model.cuda_graphs" for why, holds in reasons.items() if holds]


def graph_numbers(
    config: Config, arch: Architecture, dims: ParallelDims, tokens: int, held: int, *, split: bool
) -> int:
    """Return how many tensor elements a rank stores for graphs, in addition to activations; 0 without graphs.

    tokens  number of tokens of a row
    held    number of layers whose activations the rank keeps, summed over all micro-batches in flight
    split   whether sequence parallelism shards the activations outside the tensor-parallel regions

    For each of the ``held`` layers, there is a copy of attention's output. All layers of a chunk share two kinds of
    memory: the buffers for gradients at both ends of a piece, and the intermediate results of a backward pass. The
    backward pass of the MLP has the most intermediate results. Gradients of trained weights are intermediate results
    too: they are needed only until they have been added to ``main_grad``.
    """
    if not config.model.cuda_graphs:
        return 0
    attended, hidden, ffn = arch.value_size // dims.tp, arch.hidden_size, arch.ffn_hidden_size // dims.tp
    ends = arch.qkv_size // dims.tp + attended + 4 * (hidden // dims.tp if split else hidden)
    results = (2 + arch.gated) * ffn + 2 * hidden
    weights = 0 if config.adapter else hidden * (attended + (2 + arch.gated) * ffn)
    tokens = -(-tokens // dims.cp)
    return tokens * held * attended + dims.chunks * (tokens * (ends + results) + weights)


class ChunkGraphs:
    """The recordings of one model chunk.

    slot           slot of the current forward pass; None: layers run without recordings
    await_weights  waits until all weights of a layer are gathered
    shared         memory of all backward passes
    """

    def __init__(self) -> None:
        self.slot: Slot | None = None
        self.await_weights: Callable[[nn.Module], None] = lambda layer: None
        self.shared = recording.SharedMemory()
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._warm = self._on = False
        self._trains = True  # whether layers of this chunk compute gradients
        _open.add(self)

    def begin_step(self) -> None:
        """Turn recordings on, except in the first step and after :meth:`close`."""
        self._on, self._free = self._warm and self._trains, list(self._slots)

    def end_step(self) -> None:
        """Turn recordings off."""
        self._on, self._warm, self.slot = False, True, None

    def begin_forward(self) -> None:
        """Choose a slot for the forward pass of a micro-batch."""
        if not self._on:
            return
        if not self._free:
            self._slots.append(Slot(self.shared))
            self._free.append(self._slots[-1])
        self.slot = self._free.pop()
        self.slot.begin(after=partial(self._free.append, self.slot))

    def end_forward(self) -> None:
        """Let everything that follows run without recordings."""
        if self.slot is not None and not self.slot.trains:
            # Without a backward pass, nothing would show when the slot is free again.
            self.close()
        self.slot = None

    def close(self) -> None:
        """Free all recordings."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._trains = self._on = False


class Slot:
    """The recordings of a chunk's layers for one micro-batch in flight.

    shared   memory of all backward passes of the chunk
    """

    def __init__(self, shared: recording.SharedMemory):
        self._shared = shared
        self._pool = recording.new_pool()
        self._kept: list[Tensor] = []
        self._pieces: dict[str, recording.Piece] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: set[int] = set()  # addresses
        self._loaded: set[str] = set()
        self._after: Callable[[], None] = lambda: None

    def begin(self, after: Callable[[], None]) -> None:
        """Begin the forward pass of a micro-batch. At the end of this micro-batch's backward pass, call ``after``."""
        self._loaded.clear()
        self._after = after

    @property
    def trains(self) -> bool:
        """Whether any piece has a backward pass."""
        return any(piece.backward for piece in self._pieces.values())

    def run(
        self,
        name: str,
        work: Callable[..., tuple[Tensor, ...]],
        given: Mapping[str, Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> tuple[Tensor, ...]:
        """Return ``work(*given.values())`` by a replay. The first call records the work.

        name        name of the piece within the chunk
        given       inputs by name. In one forward pass, the same name must have the same value for all pieces
        parameters  parameters that the work can use

        *Collectives*: those of ``work``, forward and backward.
        """
        inputs = [self._load(key, tensor) for key, tensor in given.items()]
        piece = self._pieces.get(name)
        if piece is None:
            memory = {"pool": self._pool, "kept": self._kept, "shared": self._shared}
            piece = recording.Piece(work, inputs, parameters, **memory)
            if piece.backward and not self.trains:  # the first piece of a forward pass is the last of its backward pass
                piece.after = lambda: self._after()
            self._pieces[name] = piece
            self._outputs |= {output.data_ptr() for output in piece.outputs}
        return piece(*given.values())

    @torch.no_grad()
    def _load(self, name: str, given: Tensor) -> Tensor:
        """Copy an input to the tensor that recordings read, and return this tensor."""
        own = self._inputs.get(name)
        if own is None:
            # The output of a piece never moves, so it needs no copy.
            own = given.detach() if given.data_ptr() in self._outputs else torch.empty_like(given)
            self._inputs[name] = own.requires_grad_(given.requires_grad)
        if own.shape != given.shape:
            raise RuntimeError(f"{name}: the shape is {[*given.shape]}, but {[*own.shape]} was recorded")
        if name not in self._loaded and own.data_ptr() != given.data_ptr():
            own.copy_(given)
        self._loaded.add(name)
        return own

    def close(self) -> None:
        """Free the recordings."""
        for piece in self._pieces.values():
            piece.reset()


_open: WeakSet[ChunkGraphs] = WeakSet()


def without_graphs(config: Config) -> Config:
    """Return the configuration without CUDA graphs, for everything that does not train."""
    return config.model_copy(update={"model": config.model.model_copy(update={"cuda_graphs": False})})


def attach_graphs(chunks: Sequence[nn.Module], config: Config) -> None:
    """With ``model.cuda_graphs``, give recordings to all layers of a model, except to the model's last layer."""
    for chunk in chunks if config.model.cuda_graphs else ():
        chunk.graphs = ChunkGraphs()
        for layer in chunk.decoder.layers:
            if not layer.last:
                layer.graphs = chunk.graphs


@contextmanager
def recordings(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Use the recordings of a model, if it has any, in the forward and backward passes inside a ``with`` block.

    chunks   model chunks, which can be wrapped in DDP
    """
    found = [plain.graphs for plain in (getattr(chunk, "module", chunk) for chunk in chunks) if plain.graphs]
    for graphs in found:
        graphs.begin_step()
    try:
        yield
    finally:
        for graphs in found:
            graphs.end_step()


def close_graphs() -> None:
    """Free the recordings of all models. Call this also after an error.

    NCCL does not destroy a communicator as long as a recording uses it.
    """
    for graphs in list(_open):
        graphs.close()
