"""Run micro-batches through the model with one of Megatron's schedules: no pipelining, 1F1B, or interleaved 1F1B."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.faults import reach
from dpo_engine.platform.parallel import ParallelGroups, progress


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    finish: Callable[[int, Batch, Tensor, Tensor], tuple[Tensor, Any]],
    *,
    groups: ParallelGroups,
    backward: bool,
) -> list[Any]:
    """Run the forward pass, and optionally the backward pass, of every micro-batch.

    chunks   this rank's model chunks, wrapped in Megatron's DDP if gradients are needed
    batches  this rank's micro-batches. All ranks have the same number of them, and all ranks that share a model copy
             have the same pairs
    finish   called on the last stage as ``finish(index, batch, hidden [m, h], head [v/t, h])``, with the hidden states
             at the scored sites and the weight of the output layer; returns the scalar to differentiate, and a result

    Returns  on the last stage, the result of ``finish`` for each micro-batch; on other stages, an empty list

    Megatron must not rescale the scalar. Therefore ``calculate_per_token_loss`` is set and the loss function returns a
    3-tuple: in every other form, some supported version divides the scalar by the number of micro-batches or by the
    context-parallel size.
    """
    no_tokens = torch.zeros((), dtype=torch.int, device=batches[0].tokens.device)

    def forward_step(stream: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index, batch = next(stream)
        progress()
        if backward:
            reach("forward")

        def at_end(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            scalar, result = finish(index, batch, hidden, getattr(chunk, "module", chunk).head)
            return scalar, no_tokens.clone(), result

        return chunk(batch.tokens, batch.positions, batch.segments, batch.columns, batch.scored.sites), at_end

    streams = [iter(enumerate(batches)) for _ in chunks]
    rows, share = batches[0].tokens.shape
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=streams if len(streams) > 1 else streams[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=share * groups.cp.size(),
        micro_batch_size=rows,
        forward_only=not backward,
    )
