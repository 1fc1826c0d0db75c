"""Run micro-batches through the model with one of Megatron's schedules: no pipelining, 1F1B, or interleaved 1F1B."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.faults import reach
from dpo_engine.platform.parallel import ParallelGroups, progress
from dpo_engine.platform.progress_line import advance


class KnownShapes(P2PCommunicator):
    """Megatron's communication between pipeline stages, for micro-batches whose shapes every stage knows.

    Micro-batches of a non-interleaved schedule can have different lengths. Megatron's own class therefore sends the
    shape of each tensor before the tensor, and the host must wait for the device before it can read the shape. Here,
    every stage has all micro-batches, so it knows the shapes without this exchange.

    shapes  for each micro-batch, the shape of the tensor that one stage sends to the next: ``[s/cp (/t), r, h]``
    """

    def __init__(self, group: dist.ProcessGroup, config: Any, shapes: Sequence[list[int]]):
        super().__init__(group, config)
        # A stage receives the outputs of the stage before it, and the gradients from the stage after it, in the order
        # of the micro-batches.
        self._outputs, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(self, *sent: Any) -> tuple[list[int], list[int]]:
        *_, recv_prev, recv_next = sent
        nothing = [0, 0, 0]
        return next(self._outputs) if recv_prev else nothing, next(self._gradients) if recv_next else nothing


def logit_softcap(chunks: Sequence[torch.nn.Module]) -> float | None:
    """Return the soft cap of the model's logits, which applies after the product with the output layer's weight."""
    return get_model_config(chunks[0]).arch.logit_softcap


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    finish: Callable[[int, Batch, Tensor, Tensor], tuple[Tensor, Any]],
    *,
    groups: ParallelGroups,
    backward: bool,
    entries: Sequence[Tensor] | None = None,
) -> list[Any]:
    """Run the forward pass, and optionally the backward pass, of every micro-batch.

    chunks   this rank's model chunks, wrapped in Megatron's DDP if gradients are needed
    batches  this rank's micro-batches. All ranks have the same number of micro-batches, and all ranks that share a
             model copy have the same pairs
    finish   called on the last stage as ``finish(index, batch, hidden [m, h], head [v/t, h])``, with the hidden states
             at the scored sites and the weight of the output layer; returns the scalar to differentiate, and a result
    entries  for each micro-batch, the tokens at which router losses are computed, from
             :func:`~dpo_engine.model.router_losses.response_tokens`; None: no router losses are computed

    Returns  on the last stage, the result of ``finish`` for each micro-batch; on other stages, an empty list

    *Collectives*: those of the model chunks and of ``finish``, sends and receives over pp and, with ``backward``, the
    reduction of the gradients.

    Megatron must not rescale the scalar. Therefore ``calculate_per_token_loss`` is set, and the loss function returns a
    3-tuple. With any other return value, at least one supported version of Megatron divides the scalar by the number of
    micro-batches or by the context-parallel size.
    """
    no_tokens = torch.zeros((), dtype=torch.int, device=batches[0].tokens.device)

    def forward_step(stream: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index, batch = next(stream)
        progress()
        if stream is streams[0]:
            advance(len(batch.index))
        if backward:
            reach("forward")

        def at_end(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            scalar, result = finish(index, batch, hidden, getattr(chunk, "module", chunk).head)
            return scalar, no_tokens.clone(), result

        judged = None if entries is None else entries[index]
        return chunk(batch.tokens, batch.positions, batch.segments, batch.columns, batch.scored.sites, judged), at_end

    streams = [iter(enumerate(batches)) for _ in chunks]
    rows, share = batches[0].tokens.shape
    config = get_model_config(chunks[0])
    communication: dict[str, Any] = {}
    if config.variable_seq_lengths:
        split = groups.tp.size() if config.sequence_parallel else 1
        sizes = [batch.tokens.shape for batch in batches]
        shapes = [[columns // split, rows, config.hidden_size] for rows, columns in sizes]
        communicator = KnownShapes(groups.pp, config, shapes)
        communication = {"p2p_communicator": communicator, "pg_collection": groups.megatron}
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=streams if len(streams) > 1 else streams[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=share * groups.cp.size(),
        micro_batch_size=rows,
        forward_only=not backward,
        **communication,
    )
