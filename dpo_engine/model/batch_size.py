"""Choose the layout and the size of micro-batches, if the configuration sets them to ``auto``.

Larger micro-batches are more efficient: a GPU idles between small kernels, and each micro-batch reads and writes all
gradients once. As the size grows, the gain becomes smaller; above `ENOUGH` tokens, it is a few percent. Three other
facts matter for the size. Memory sets a maximum (:mod:`~dpo_engine.model.memory`). The stages of a pipeline idle while
the pipeline fills and drains, and with fewer micro-batches this idle time is a larger part of a step. A pair is never
split, so a micro-batch must have room for the longest pair.

The choice depends only on the configuration, the model, the pairs, the number of ranks, the attention backend, and the
type and total memory of the devices. It does not depend on the memory that is free at the moment. A resumed run on the
same devices therefore has the same micro-batches, and its results are bitwise equal to those of an uninterrupted run.
"""

from __future__ import annotations

import bisect
import math

from dpo_engine.batching.micro_batches import choose_layout, pair_tokens
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.memory import GIB, memory
from dpo_engine.platform.dims import ParallelDims

ENOUGH = {"gpu": 8192, "cpu": 2048}
"""Number of tokens that a context-parallel rank has in an efficient micro-batch. More tokens would save little time."""

OVERHEAD = {"gpu": 224, "cpu": 96}
"""Overhead of each micro-batch on a context-parallel rank, in units of the time that the rank needs for one token.

On a GPU, this is the time to read and write fp32 gradients and to read bf16 weights twice (12 bytes per weight, at an
H100's bandwidth), divided by the time to compute a token (8 FLOP per weight, at half of an H100's peak). The number for
CPUs was derived from the measured throughput of rows of 512 to 4,096 tokens."""

USABLE = 0.92
"""Share of a device's memory that the estimate may fill.

The rest is for the estimate's error. The error is largest, 6 %, in rows of trees (prompts, each followed by its
responses) with the attention backend ``varlen`` and context parallelism."""


def settle_batches(
    config: Config,
    arch: Architecture,
    dims: ParallelDims,
    pairs: PairDataset,
    *,
    dtype: str,
    device_memory: int | None,
    slow_trees: bool,
) -> tuple[Config, list[str]]:
    """Replace ``auto`` in ``batch.layout`` and ``batch.tokens_per_micro_batch``.

    dtype          "fp64", "fp32" or "bf16"
    device_memory  memory of the smallest device, in bytes; None: the devices are CPUs
    slow_trees     see :func:`~dpo_engine.batching.micro_batches.choose_layout`

    Returns  the configuration without ``auto``, and lines for the log. If ``train.micro_batch_size`` is set, it gives
             the number of pairs in a micro-batch. The number of tokens then depends on the pairs, and
             ``batch.tokens_per_micro_batch`` remains ``auto``
    """

    def sized(layout: str) -> tuple[Config, str]:
        if config.train.micro_batch_size is not None or config.batch.tokens_per_micro_batch != "auto":
            return config, ""
        each = pair_tokens(pairs, config, layout)
        together = float(each.mean()) * min(config.train.global_batch_size, len(each))
        tokens, reason = choose_tokens(
            config,
            arch,
            dims,
            dtype=dtype,
            device_memory=device_memory,
            longest=int(each.max()),
            per_step=together / dims.dp,
        )
        return _with_batch(config, tokens_per_micro_batch=tokens), f"micro-batches: at most {tokens:,} tokens; {reason}"

    layout, reason = choose_layout(sized("stacked")[0], pairs, slow_trees=slow_trees)
    settled, line = sized(layout)
    return _with_batch(settled, layout=layout), [f"batch layout: {layout}; {reason}", *([line] if line else [])]


def _with_batch(config: Config, **values: int | str) -> Config:
    return config.model_copy(update={"batch": config.batch.model_copy(update=values)})


def choose_tokens(
    config: Config,
    arch: Architecture,
    dims: ParallelDims,
    *,
    dtype: str,
    device_memory: int | None,
    longest: int,
    per_step: float,
) -> tuple[int, str]:
    """Return the maximum number of tokens in a micro-batch, and the reason for this choice as text for the log.

    dtype, device_memory  as for :func:`settle_batches`
    longest   number of tokens of the longest pair
    per_step  average number of tokens that a data-parallel rank has in a step
    """
    device = "cpu" if device_memory is None else "gpu"
    enough = ENOUGH[device] * dims.cp
    tokens, reason = enough, "more would save little time"
    if dims.pp > 1:
        # With m micro-batches, the bubble takes (pp - 1) / (m * chunks) of the step's work, and the micro-batches
        # add m times the overhead of one. The sum of the two is smallest where they are equal.
        even = int(math.sqrt(per_step * OVERHEAD[device] * dims.cp * dims.chunks / (dims.pp - 1)))
        if even < tokens:
            tokens, reason = even, "with more, pipeline stages would be idle for too large a part of a step"
    if longest > tokens:
        tokens, reason = longest, "this is the length of the longest pair"
    if device_memory is None:
        return tokens, reason
    room = _room(config, arch, dims, dtype, device_memory, tokens)
    available = f"{device_memory / GIB:.1f} GiB of device memory"
    if room >= tokens:
        return tokens, f"{reason}, and the memory estimate is below {USABLE:.0%} of {available}"
    if room >= longest:
        return room, f"as many as fit into {USABLE:.0%} of {available}, according to the memory estimate"
    return longest, (
        f"this is the length of the longest pair, although {USABLE:.0%} of {available} has room for only {room:,} "
        "tokens, according to the memory estimate"
    )


def _room(config: Config, arch: Architecture, dims: ParallelDims, dtype: str, device_memory: int, most: int) -> int:
    """Return ``most`` if that many tokens fit into the memory, else the largest multiple of 256 that fits, or 0."""

    def too_large(tokens: int) -> bool:
        return memory(config, arch, dims, dtype=dtype, tokens=tokens).needed > USABLE * device_memory

    if not too_large(most):
        return most
    sizes = range(256, most, 256)
    fitting = bisect.bisect_left(sizes, True, key=too_large)
    return sizes[fitting - 1] if fitting else 0


def largest_micro_batch(
    config: Config, arch: Architecture, dims: ParallelDims, *, dtype: str, device_memory: int | None
) -> int:
    """Return the number of tokens in the largest micro-batch of a run whose pairs are not known yet.

    Every pair is assumed to have the maximum size, twice ``data.max_length`` tokens. ``data.max_length`` is the maximum
    length of a prompt with one response.

    dtype, device_memory  as for :func:`settle_batches`. A ``device_memory`` of 0 stands for a device that has just
                          enough memory for one pair
    """
    pair = 2 * config.data.max_length
    if config.train.micro_batch_size is not None:
        return pair * config.train.micro_batch_size
    if config.batch.tokens_per_micro_batch != "auto":
        return config.batch.tokens_per_micro_batch
    per_step = pair * config.train.global_batch_size / dims.dp
    facts = {"dtype": dtype, "device_memory": device_memory, "longest": pair, "per_step": per_step}
    tokens = choose_tokens(config, arch, dims, **facts)[0]
    if config.fixed_row_reason:  # every row is padded to the size that was chosen
        return tokens
    return min(tokens, max(pair, math.ceil(per_step)))
