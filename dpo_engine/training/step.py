"""One optimiser step over one global batch of pairs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.model.pipeline import run_pipeline
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import pair_logps
from dpo_engine.scoring.reference import Reference
from dpo_engine.training.metrics import pair_sums, reduce_pair_sums
from dpo_engine.training.optimizer import Trained


class Objective:
    """A loss with its options filled in: what the step differentiates and what it reports."""

    def __init__(self, loss: Callable[..., Tensor], options: dict[str, Any]):
        self.loss = functools.partial(loss, **options)
        self.options = options
        self.beta = options.get("beta", 1.0)

    def __call__(self, policy: PairLogps, reference: PairLogps | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the pairs' losses (a scalar with gradient), and the micro-batch's metric sums."""
        losses = self.loss(policy, reference)  # [b]
        present = weights > 0
        losses = torch.where(present, losses, 0.0)
        sums = pair_sums(losses.detach(), policy.map(Tensor.detach), reference, weights, beta=self.beta)
        return (losses * weights).sum(), sums


def train_step(
    trained: Trained,
    reference: Reference,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    total_weight: float,
    vocab_size: int,
    groups: ParallelGroups,
) -> dict[str, float]:
    """Score with the reference, run the policy forward and backward, update it once.

    batches       this rank's micro-batches of the global batch (its data-parallel part, its context-parallel share)
    total_weight  sum of the weights of *all* pairs of the global batch: the loss is their weighted mean

    Returns  the metrics of the step, equal on every rank: those of :data:`PAIR_METRICS` before the update,
             ``grad_norm`` before clipping, and the ``learning_rate`` used

    *Collectives*: those of the schedules; gradients over dp_cp (and tied or replicated weights over embd and tp); the
    grad norm over all ranks of a model copy; one SUM of the metrics over dp and a broadcast over pp.
    """
    reference_logps = reference.logps(batches)

    def finish(index: int, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        policy = pair_logps(logits, batch, vocab_size=vocab_size, groups=groups)
        scalar, sums = objective(policy, reference_logps[index] if reference_logps else None, batch.weights)
        return scalar / total_weight, sums

    for chunk in trained.chunks:
        chunk.zero_grad_buffer()
    trained.optimizer.zero_grad()
    sums = run_pipeline(trained.chunks, batches, finish, groups=groups, backward=True)
    learning_rate = trained.schedule.get_lr(trained.optimizer.param_groups[0])
    _, grad_norm, _ = trained.optimizer.step()
    trained.schedule.step(1)
    metrics = reduce_pair_sums(sum(sums) if sums else None, total_weight, groups, batches[0].tokens.device)
    return {**metrics, "grad_norm": float(grad_norm), "learning_rate": learning_rate}
