"""Attach the adapters that a run starts with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dpo_engine.config.run import Config
from dpo_engine.model.adaptation import Adaptation
from dpo_engine.model.adapters import attach
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.adapter_weights import draw_adapters, load_adapters
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
