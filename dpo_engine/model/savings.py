"""List changes to a run that reduce the memory use of its ranks. Changes that cost the least speed come first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_engine.config.run import Config
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.memory import Memory, has_resident_reference, memory
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.wording import show

LAYOUT = ("tp", "pp", "cp", "ep")


class Change(NamedTuple):
    """A change to a run: its text ``KEY=VALUE``, and the configuration and parallel sizes of the changed run.

    tokens  number of tokens in the largest micro-batch, over all its rows
    """

    name: str
    config: Config
    dims: ParallelDims
    tokens: int


def savings(
    config: Config, arch: Architecture, dims: ParallelDims, *, dtype: str, tokens: int
) -> list[tuple[Change, Memory]]:
    """Return each change that by itself lowers the estimated peak, with the estimate for the changed run.

    dtype, tokens   as for :func:`~dpo_engine.model.memory.memory`
    """
    now = memory(config, arch, dims, dtype=dtype, tokens=tokens).peak
    changes = [*lighter_runs(config, dims, dtype=dtype, tokens=tokens), *_divided(config, arch, dims, tokens)]
    costs = [(one, memory(one.config, arch, one.dims, dtype=dtype, tokens=one.tokens)) for one in changes]
    return [(change, cost) for change, cost in costs if cost.peak < now]


def lighter_runs(config: Config, dims: ParallelDims, *, dtype: str, tokens: int) -> Iterator[Change]:
    """Yield the changes to keys that do not affect the parallel layout. ``data.max_length`` is never changed."""

    def changed(key: str, value: Any, tokens: int = tokens) -> Change:
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        return Change(f"{key}={show(value)}", config.model_copy(update={section: part}), dims, tokens)

    if has_resident_reference(config):
        yield changed("reference.mode", "stored")
    pairs = config.train.micro_batch_size
    if pairs is None and tokens // 2 >= 2 * config.data.max_length:  # a pair is never split over micro-batches
        yield changed("batch.tokens_per_micro_batch", tokens // 2, tokens // 2)
    for size in sorted({pairs // 2, 1} - {0, pairs}, reverse=True) if pairs else ():
        yield changed("train.micro_batch_size", size, tokens * size // pairs)
    if dtype == "bf16" and config.optim.gradients == "fp32" and config.adapter is None:
        yield changed("optim.gradients", "bf16")
    if config.model.cuda_graphs:  # work that CUDA graphs record cannot be recomputed
        yield changed("model.cuda_graphs", False)
    else:
        for recompute in ("selective", "full")[("none", "selective", "full").index(config.model.recompute) :]:
            yield changed("model.recompute", recompute)
    optim = config.optim
    if optim.states == "device" and optim.optimizer == "adamw" and config.parallel.distributed_optimizer:
        yield changed("optim.states", "host")


def _divided(config: Config, arch: Architecture, dims: ParallelDims, tokens: int) -> Iterator[Change]:
    """Yield the changes that double one of tp, pp, cp and ep. The number of ranks stays the same."""
    for name in ("tp", "pp", "cp", "ep"):
        size = 2 * getattr(dims, name)
        sizes = config.parallel.model_copy(update={"vpp": dims.vpp, **{key: getattr(dims, key) for key in LAYOUT}})
        sizes = sizes.model_copy(update={name: size})
        if dims.world % ParallelDims.fewest(sizes) == 0:
            divided = replace(ParallelDims.of(sizes, dims.world), layers=None if name == "pp" else dims.layers)
            if not divided.problems(arch):
                yield Change(f"parallel.{name}={size}", config, divided, tokens)
