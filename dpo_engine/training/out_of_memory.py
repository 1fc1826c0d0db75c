"""Explain an out-of-memory error of a GPU: what was planned, what was allocated, and what to change."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo_engine.errors import EngineError
from dpo_engine.model.batch_size import largest_micro_batch
from dpo_engine.model.memory import OUTSIDE, gib, stage_memory
from dpo_engine.model.savings import savings
from dpo_engine.training.engine import Engine

SHOWN = 6
"""Maximum number of changes that the error names."""


@contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Inside the block, turn an out-of-memory error of the GPU into an error that explains it.

    The traceback is printed to stderr, because it shows which operation needed the memory.

    Raises :class:`~dpo_engine.errors.EngineError`, on this rank alone, for ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        failure = EngineError(explanation(engine, error))
        failure.alone = True
        raise failure from None


def explanation(engine: Engine, error: torch.OutOfMemoryError) -> list[str]:
    """Return the lines of the message: the failed allocation, the plan for this rank, and changes that need less."""
    config, arch, dims = engine.config, engine.arch, engine.groups.dims
    dtype = "bf16" if engine.dtype is torch.bfloat16 else "fp32"
    tokens = largest_micro_batch(config, arch, dims, dtype=dtype, device_memory=None)
    planned = stage_memory(config, arch, dims, engine.groups.pp.rank(), dtype, tokens)
    allocated, _, _ = str(error).partition(" If reserved but")  # then follows advice about the allocator's options
    lines = [
        allocated,
        f"planned for this rank: {gib(planned.peak)} = {planned.terms}; rows of "
        f"{tokens:,} tokens per micro-batch; a GPU needs about {gib(OUTSIDE)} more",
    ]
    found = savings(config, arch, dims, dtype=dtype, tokens=tokens)
    names = ", ".join(f"{change.name} ({gib(cost.peak)})" for change, cost in found[:SHOWN])
    way_out = f"next: one of {names}" if found else "no key lowers the plan; use more ranks, or lower data.max_length"
    if found:
        way_out += "; in order of increasing cost in speed, each with the plan of the rank that needs the most"
    return [*lines, way_out]
