"""Set up the adapters of a run, describe them, and export them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dpo_engine.config.run import Config
from dpo_engine.model.adaptation import Adaptation, adapter_parameters, adapter_shapes
from dpo_engine.model.adapters import attach
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.memory import parameters
from dpo_engine.model.weights.adapter_weights import draw_adapters, load_adapters
from dpo_engine.model.weights.peft import adapter_digest
from dpo_engine.platform.long_work import Meter, from_first
from dpo_engine.platform.parallel import ParallelGroups


def adapt(
    chunks: Sequence[nn.Module],
    config: Config,
    adaptation: Adaptation,
    arch: Architecture,
    groups: ParallelGroups,
    *,
    dtype: torch.dtype,
) -> None:
    """Freeze a loaded model and attach the adapters that the run starts with.

    dtype   dtype of the adapters' parameters

    *Collectives* and errors: those of :func:`~dpo_engine.model.adapters.attach` and
    :func:`~dpo_engine.model.weights.adapter_weights.load_adapters`.
    """
    attach(chunks, adaptation, arch, groups, dtype=dtype)
    if config.adapter.path is None:
        draw_adapters(chunks, adaptation, arch, groups=groups, seed=config.train.seed)
    else:
        load_adapters(chunks, adaptation, arch, config.adapter.path, groups=groups)


def start_digest(config: Config, groups: ParallelGroups) -> str | None:
    """Return the digest of the adapter that the run starts from; None for a new adapter.

    *Collectives*: one broadcast of an object from rank 0.
    """
    path = config.adapter.path
    if path is None:
        return None
    return from_first(groups.world, lambda: adapter_digest(path), Meter("hashing adapter.path"))


def adapter_lines(config: Config, adaptation: Adaptation | None, arch: Architecture) -> list[str]:
    """Return a line for the log that describes the adapters, if there are any."""
    if adaptation is None:
        return []
    shapes = adapter_shapes(adaptation, arch)
    ranks = sorted({shape.rank for shape in shapes.values()})
    projections = list(dict.fromkeys(name.rpartition(".")[2] for name in shapes))
    start = config.adapter.path or "new"
    return [
        f"adapter: {adaptation.kind} of rank {' and '.join(map(str, ranks))} on {len(shapes)} projections "
        f"({', '.join(projections)}), {start}; trains {adapter_parameters(adaptation, arch):,} parameters, and "
        f"{parameters(arch):,} are frozen"
    ]
