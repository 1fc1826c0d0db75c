"""Divide the layers of a model among the model chunks of the pipeline stages."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from dpo_engine.batching.packing import visible_pairs
from dpo_engine.config.run import Config
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.sizes import attention_inputs, attention_output, mlp_parameters, score_size
from dpo_engine.platform.dims import ParallelDims

SCORED = 0.5
"""Assumed share of a row's tokens for which the output layer is computed. In most preference data, responses are
about as long as their prompts."""


def parallel_dims(config: Config, arch: Architecture, world: int) -> ParallelDims:
    """Return the sizes of a run's parallel dimensions for ``world`` ranks, and the number of layers per model chunk.

    Raises :class:`~dpo_engine.errors.ConfigError` if the sizes in ``parallel`` are not possible with ``world`` ranks.
    """
    dims = ParallelDims.of(config.parallel, world)
    return with_layers(dims, config.parallel.layers, arch, config.data.max_length)


def with_layers(
    dims: ParallelDims, layers: Sequence[int] | str | None, arch: Architecture, length: int
) -> ParallelDims:
    """Return ``dims`` with the number of layers of each model chunk, from ``parallel.layers``.

    length   number of tokens in a row

    With one stage, or if ``layers`` is None, ``dims`` is returned unchanged. The same holds for ``auto`` if there are
    fewer layers than chunks; :meth:`ParallelDims.problems` then reports the problem.
    """
    if layers is None or dims.pp == 1:
        return dims
    if layers == "auto":
        if arch.num_layers < dims.pp * dims.chunks:
            return dims
        layers = balanced_layers(arch, dims.pp * dims.chunks, length)
    return replace(dims, layers=tuple(layers))


@lru_cache(maxsize=1024)
def balanced_layers(arch: Architecture, chunks: int, length: int) -> tuple[int, ...]:
    """Divide the layers so that the work is balanced over the chunks. Return the number of layers of each chunk.

    The chunk with the most work determines the speed, so the largest work of a chunk is minimized. Among the divisions
    with this minimum, the one with the smallest sum of squared work is returned. Only the forward pass is counted:
    matrix products, attention, and, in the last chunk, the output layer. The work of the embedding is ignored.

    length   number of tokens in a row
    """
    work = [layer_work(arch, layer, length) for layer in range(arch.num_layers)]
    start = [0.0]
    for one in work:
        start.append(start[-1] + one)
    head = 2 * SCORED * arch.hidden_size * arch.vocab_size

    def of(first: int, end: int) -> float:
        return start[end] - start[first] + (head if end == arch.num_layers else 0.0)

    # worst[first]: the largest work of a chunk if the layers from `first` to the end are divided in the best way among
    # the last chunks of the model. Each pass of the outer loop adds one chunk at the front.
    count, never = arch.num_layers, float("inf")
    worst = [of(first, count) for first in range(count)] + [never]
    for _ in range(1, chunks):
        for first in range(count):  # ascending, because worst[end] must still be the value for one chunk fewer
            least = never
            for end in range(first + 1, count):
                if of(first, end) >= least:
                    break
                least = min(least, max(of(first, end), worst[end]))
            worst[first] = least
    limit = worst[0] * (1 + 1e-12)
    # spread[first]: for the same layers and chunks, the division with the smallest sum of squared work among those in
    # which no chunk exceeds the limit. The entry has this sum, and the number of layers of each chunk.
    spread: list[tuple[float, tuple[int, ...]]] = [
        (of(first, count) ** 2, (count - first,)) if of(first, count) <= limit else (never, ())
        for first in range(count)
    ] + [(never, ())]
    for _ in range(1, chunks):
        for first in range(count):
            least = never, ()
            for end in range(first + 1, count):
                if of(first, end) > limit:
                    break
                least = min(least, (of(first, end) ** 2 + spread[end][0], (end - first, *spread[end][1])))
            spread[first] = least
    return spread[0][1]


@lru_cache(maxsize=4096)
def layer_work(arch: Architecture, layer: int, length: int) -> float:
    """Return the floating-point operations per token of a layer's forward pass, in a row of ``length`` tokens."""
    matrices = attention_inputs(arch) + attention_output(arch) + mlp_parameters(arch, layer)
    keys = visible_pairs(length, arch.windows[layer]) / length  # mean number of keys that a query sees
    return 2.0 * matrices + 4.0 * score_size(arch) * keys


def stage_work(arch: Architecture, dims: ParallelDims, length: int) -> list[float]:
    """Return the floating-point operations per token of each stage's forward pass, over all its model chunks."""
    stages = [dims.layers_of(stage, arch.num_layers) for stage in range(dims.pp)]
    work = [sum(layer_work(arch, layer, length) for layer in layers) for layers in stages]
    work[-1] += 2 * SCORED * arch.hidden_size * arch.vocab_size
    return work
