"""Count the tokens and floating-point operations of a step, for the throughput metrics.

Only matrix products count. Each token takes 2 operations per matrix parameter. Experts that the token does not use do
not count. The output layer counts only at scored sites, which are the positions that predict scored tokens. For each
visible (query, key) pair, an attention head takes 4 x (head size) operations. If queries and values have different
sizes, the head size is the mean of the two. Pairs that are not visible do not count, because a kernel skips them. In a
layer with a sliding window, pairs outside the window are not visible. The operations of recomputation
(`model.recompute`) do not count.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.batching.micro_batches import padded_rows
from dpo_engine.batching.packing import visible_pairs
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.model.adaptation import matrix_parameters
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.sizes import attention_inputs, attention_output, mlp_parameters, score_size
from dpo_engine.platform.device import peak_flops
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.scoring.reference import Reference
from dpo_engine.training.engine import Engine

BACKWARD = 2
"""Operations of a backward pass per operation of a forward pass: the gradients of one matrix product need two products.

With adapters, a product with a frozen matrix needs only one product in the backward pass, for the gradient of its
input."""


class Work(NamedTuple):
    """The work of a global batch, in one forward pass.

    mine    [3]  fp64, the result of :func:`forward_work` for this rank
    padded       the result of :func:`padded_flops`, for all ranks
    """

    mine: Tensor
    padded: float


def count_work(engine: Engine, pairs: PairDataset, indices: np.ndarray, batches: Sequence[Batch]) -> Work:
    """Count the work of a global batch.

    indices  the pairs of the global batch
    batches  this rank's micro-batches of these pairs, in host memory
    """
    dims, sequence = engine.groups.dims, engine.sequence_parallel
    padded = padded_flops(engine.arch, pairs, indices, engine.config, dims, sequence)
    return Work(forward_work(engine.arch, batches), padded)


def speed(engine: Engine, reference: Reference, work: Work, elapsed: float) -> dict[str, float]:
    """Return a step's metrics ``tokens_per_s``, ``layout_gain`` and, if the GPU's peak FLOP/s is known, ``mfu``.

    If ``optim.freeze`` or ``train.freeze_router`` is set, or if a run with adapters has no adapter in the first layer,
    a step omits some products. The count would still include these products, so ``mfu`` is then left out.

    work      the work of the step's global batch
    elapsed   duration of the step, in seconds

    *Collectives*: SUM of three numbers over dp_cp.
    """
    total = work.mine.to(engine.platform.device, copy=True)
    dist.all_reduce(total, group=engine.groups.dp_cp)
    tokens, products, attention = total.tolist()
    dims = engine.groups.dims
    metrics = {"tokens_per_s": tokens / elapsed, "layout_gain": work.padded / (products + attention)}
    peak = peak_flops(engine.platform, engine.dtype)
    frozen = engine.config.optim.freeze or engine.config.train.freeze_router
    if peak and not frozen and not engine.omits_gradients:
        own = 1 + engine.objective.facts.couples_pairs
        forward = own + reference.passes
        flops = (forward + (1 if engine.adaptation else BACKWARD)) * products + (forward + BACKWARD) * attention
        if engine.adaptation:
            also = reference.passes * bool(engine.config.reference_has_adapter or engine.config.reference.sync_every)
            flops += (own + also + BACKWARD) * 2 * tokens * matrix_parameters(engine.adaptation, engine.arch)
        metrics["mfu"] = flops / elapsed / (peak * dims.world)
    return metrics


def forward_work(arch: Architecture, batches: Sequence[Batch]) -> Tensor:
    """Return the work of one forward pass of the whole model, without adapters, over a rank's micro-batches.

    batches  this rank's micro-batches, in host memory; with context parallelism, its shares of the micro-batches. The
             sum of the results over the ranks of dp_cp covers the global batch

    Returns  [3]  fp64, in host memory: tokens, operations of the products with matrices, and operations of attention
    """
    total = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        rows, columns = batch.tokens.shape
        visible = (batch.positions + 1).double()  # a token sees itself and all earlier tokens of its sequence
        last = visible if batch.columns is None else visible[batch.columns]
        tokens, layers = rows * columns, arch.num_layers - 1  # the last layer can compute outputs for fewer positions
        before, final = range(layers), [layers]
        head = 2 * arch.hidden_size * arch.vocab_size * len(batch.scored.sites)
        total[0] += tokens
        total[1] += _products(arch, before, tokens, tokens) + _products(arch, final, tokens, rows * len(last)) + head
        *windows, near = (window or math.inf for window in arch.windows)
        seen = sum(count * visible.clamp(max=window).sum() for window, count in Counter(windows).items())
        total[2] += _attention(arch, rows * (seen + last.clamp(max=near).sum()))
    return total


def padded_flops(
    arch: Architecture, dataset: PairDataset, indices: np.ndarray, config: Config, dims: ParallelDims, sequence: bool
) -> float:
    """Return the operations of one forward pass over the pairs ``indices`` in layout ``stacked``, including padding.

    sequence  whether sequence parallelism is on
    """
    rows, columns = padded_rows(dataset, indices, config, dims, sequence).astype(np.float64).T
    tokens = (rows * columns).sum()
    windows = Counter(arch.windows).items()
    seen = sum(count * (rows * visible_pairs(columns, window)).sum() for window, count in windows)
    sites = dataset.scored[indices].sum()
    layers = _products(arch, range(arch.num_layers), tokens, tokens) + _attention(arch, seen)
    return float(layers + 2 * arch.hidden_size * arch.vocab_size * sites)


def _products(arch: Architecture, layers: Sequence[int], tokens: int, computed: int) -> int:
    """Return the number of operations of the matrix products in ``layers``.

    Experts that a token does not use do not count.


    tokens    number of tokens for which the layers compute queries, keys and values
    computed  number of tokens for which the layers compute outputs
    """
    keys, output = 2 * tokens * attention_inputs(arch), attention_output(arch)
    sizes = Counter(mlp_parameters(arch, layer) for layer in layers)
    return sum(count * (keys + 2 * computed * (output + size)) for size, count in sizes.items())


def _attention(arch: Architecture, visible: Any) -> Any:
    """Return the number of operations of attention, given the number of visible (query, key) pairs in all layers."""
    return 4 * score_size(arch) * visible
