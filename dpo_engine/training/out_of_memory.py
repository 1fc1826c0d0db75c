"""Describe the memory that is planned for a rank, and use this plan to explain an out-of-memory error of the GPU."""

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
"""Maximum number of changes to the configuration that the error message of a training run suggests."""


SCORING = ("reference.", "train.micro_batch_size", "batch.", "parallel.")
"""Prefixes of the names of changes that also lower the memory of a command that only scores pairs.

Such a command has no gradients and no optimizer."""


@contextmanager
def explained(engine: Engine, *, scoring: bool = False) -> Iterator[None]:
    """Inside the block, turn an out-of-memory error of the GPU into an error that explains it.

    The traceback is printed to stderr, because it shows which operation needed the memory.

    scoring  whether the block only scores pairs

    Raises :class:`~dpo_engine.errors.EngineError`, on this rank alone, for ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        failure = EngineError(explanation(engine, error, scoring))
        failure.alone = True
        raise failure from None


def planned_memory(engine: Engine) -> str:
    """Return the memory that is planned for this rank, and its parts, as text. Call this after `settle_batches`."""
    stage, (dtype, tokens) = engine.groups.pp.rank(), _largest_rows(engine)
    planned = stage_memory(engine.config, engine.arch, engine.groups.dims, stage, dtype, tokens)
    more = f"; a GPU needs about {gib(OUTSIDE)} more" if engine.platform.gpu else ""
    where = f" in stage {stage}" if engine.groups.dims.pp > 1 else ""
    rows = f"largest micro-batch: {tokens:,} tokens"
    return f"{gib(planned.peak)}{where} = {planned.terms}; {rows}{more}{planned.on_host}"


def _largest_rows(engine: Engine) -> tuple[str, int]:
    """Return the name of the dtype, and the number of tokens in the rows of the largest micro-batch."""
    dtype = "bf16" if engine.dtype is torch.bfloat16 else "fp32"
    if engine.row_tokens is not None:
        return dtype, engine.row_tokens
    return dtype, largest_micro_batch(engine.config, engine.arch, engine.groups.dims, dtype=dtype, device_memory=None)


def explanation(engine: Engine, error: torch.OutOfMemoryError, scoring: bool) -> list[str]:
    """Return the lines of the message: the failed allocation, this rank's plan, and changes that lower the memory."""
    allocated, _, _ = str(error).partition(" If reserved but")  # the rest is advice about the allocator's options
    dims, (dtype, tokens) = engine.groups.dims, _largest_rows(engine)
    found = savings(engine.config, engine.arch, dims, dtype=dtype, tokens=tokens)
    if scoring:
        weights = stage_memory(engine.config, engine.arch, dims, engine.groups.pp.rank(), dtype, tokens).weights
        plan = f"weights of a model on this rank: {gib(weights)}; largest micro-batch: {tokens:,} tokens"
        names = ", ".join(change.name for change, _ in found if change.name.startswith(SCORING))
        order = ""
    else:
        plan = f"planned for this rank: {planned_memory(engine)}"
        names = ", ".join(f"{change.name} ({gib(cost.peak)})" for change, cost in found[:SHOWN])
        order = (
            "; changes that cost less speed come first; each size is the planned memory of the rank that needs the "
            "most memory"
        )
    if not names:
        return [allocated, plan, "use more ranks, or lower data.max_length; no other single change lowers this memory"]
    return [allocated, plan, f"to use less memory, set one of {names}{order}"]
