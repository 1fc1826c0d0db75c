"""One optimiser step over one global batch of pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.faults import factor, reach
from dpo_engine.model.pipeline import run_pipeline
from dpo_engine.objective.losses import (
    PairLogps,
)
from dpo_engine.optim.optimizer import Trained, update
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import pair_losses
from dpo_engine.scoring.reference import Reference, score
from dpo_engine.training.metrics import reduce_pair_sums
from dpo_engine.training.objective import BatchFacts, Coupled, Objective


def train_step(
    trained: Trained,
    reference: Reference,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    known: BatchFacts,
    vocab_size: int,
    groups: ParallelGroups,
    refuses: Callable[[Mapping[str, float]], bool] = lambda metrics: False,
) -> dict[str, float]:
    """Score with the reference, run the policy forward and backward, update it once.

    batches  this rank's micro-batches of the global batch (its data-parallel part, its context-parallel share)
    known    facts of the *whole* global batch: the loss is the weighted mean over all of its pairs
    refuses  told the metrics and ``grad_norm`` before the update, says, on all ranks alike, whether to leave it out;
             the schedule goes on all the same

    A loss that couples pairs takes two passes: all pairs are scored, the derivative of the global batch's loss by every
    log-probability is formed once, and the second pass runs backward with those as coefficients.

    Returns  the metrics of the step, equal on every rank: those of the pairs before the update,
             ``grad_norm`` before clipping, and the ``learning_rate`` used

    *Collectives*: those of the schedules; gradients over dp_cp (and tied or replicated weights over embd and tp); the
    grad norm over all ranks of a model copy; one SUM of the metrics over dp and a broadcast over pp; for coupled losses
    an all-gather of the log-probabilities over dp.
    """
    reach("reference")
    reference_logps = reference.logps(batches)
    if reference_logps and (by := factor("reference-logps")) is not None:
        reference_logps = [one._replace(chosen=one.chosen * by, rejected=one.rejected * by) for one in reference_logps]
    data = [objective.data(batch, known) for batch in batches]
    coupled: list[Coupled] = []
    if objective.facts.couples_pairs:
        scored = score(trained.chunks, batches, vocab_size=vocab_size, groups=groups)
        if groups.last_stage:
            coupled = objective.couple(scored, reference_logps, data, groups)

    def finish(index: int, batch: Batch, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        against = reference_logps[index] if reference_logps else None
        by = factor("loss")

        def spoil(values: Tensor) -> Tensor:
            return values if by is None else values * by

        def contribution(policy: PairLogps, pairs: slice) -> tuple[Tensor, Tensor]:
            if coupled:
                losses, chosen, rejected = (spoil(column[pairs]) for column in coupled[index])
                counted = objective.counted(policy)
                return (chosen * counted.chosen + rejected * counted.rejected).sum(), losses
            their = against and against.map(lambda column: column[pairs])
            losses = objective.losses(policy, their, data[index].map(lambda column: column[pairs]))
            losses = spoil(losses)
            return (losses * batch.weights[pairs]).sum() / known.total_weight, losses

        entropies = objective.reads_entropies
        scalar, losses, policy = pair_losses(
            hidden, head, batch, contribution, vocab_size=vocab_size, groups=groups, entropies=entropies
        )
        return scalar, objective.sums(losses, policy, against, batch, known)

    for chunk in trained.chunks:
        chunk.zero_grad_buffer()
    trained.optimizer.zero_grad()
    with _spoiled_gradients(trained):
        sums = run_pipeline(trained.chunks, batches, finish, groups=groups, backward=True)
    learning_rate = trained.schedule.get_lr(trained.optimizer.param_groups[0])
    reported = objective.reported(known, reference=reference_logps is not None)
    device = batches[0].tokens.device
    metrics = reduce_pair_sums(sum(sums) if sums else None, reported, known.total_weight, groups, device)
    reach("optimizer")
    grad_norm = update(trained, lambda norm: refuses({**metrics, "grad_norm": norm}))
    trained.schedule.step(1)
    return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate}


@contextmanager
def _spoiled_gradients(trained: Trained) -> Iterator[None]:
    """Multiplies this rank's gradients where a fault asks for it, before anything is added up or sent."""
    by = factor("gradient")
    parameters = [p for chunk in trained.chunks for p in chunk.parameters()] if by is not None else ()

    def spoil(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient * by  # None: it was added to its sum elsewhere

    hooks = [parameter.register_hook(spoil) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
