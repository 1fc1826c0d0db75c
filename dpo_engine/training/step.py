"""One optimizer step over one global batch of pairs, also for losses that couple the pairs.

The problem: most losses are a weighted mean of per-pair losses, so each micro-batch can run forward and backward on its
own. Some losses couple the pairs: they depend on every pair in the global batch (AOT sorts all pairs, BCO shifts
rewards by a batch mean). With such a loss, no micro-batch can compute its gradient alone, and the activations of all
micro-batches together would not fit in memory.

The solution: a loss depends on the model only through two summed log-probabilities per pair. By the chain rule,

    dL/dtheta = sum over pairs of (dL/dchosen) dchosen/dtheta + (dL/drejected) drejected/dtheta.

The derivatives of L are two numbers per pair, so the step makes two passes:

1. Score all pairs without gradients, gather the log-probabilities over dp, and differentiate L with respect to them
   (`Objective.couple`).
2. Run the usual forward and backward schedule. The scalar that each micro-batch differentiates is
   ``sum(c_i * logp_i)``, where the constant coefficients ``c_i`` are the derivatives from pass 1. The gradient of this
   scalar is the micro-batch's share of dL/dtheta.

Why this way: the gradient is exact, a step needs no more memory than with other losses, and Megatron's pipeline
schedules need no change. Both passes use the same weights and the same code, without dropout, so their
log-probabilities agree. The cost is one more forward pass. Losses that do not couple pairs skip pass 1.

Not covered: a coupled loss that depends on the model through anything but the summed log-probabilities.
`loss.use_weighting` would create such a loss, because it multiplies the loss of each pair by a weight that depends on
the policy's distribution at every token. This option is therefore rejected for coupled losses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.faults import factor, reach
from dpo_engine.model.cuda_graphs import recordings
from dpo_engine.model.pipeline import logit_softcap, run_pipeline
from dpo_engine.model.router_losses import response_tokens, router_metrics, routers_of
from dpo_engine.objective.losses import (
    PairLogps,
)
from dpo_engine.optim.optimizer import Trained, update
from dpo_engine.optim.zeros import num_zeros
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.platform.ranges import part
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
    count_zeros: bool = False,
) -> dict[str, float]:
    """Score the batch with the reference, run the policy forward and backward, and update the policy once.

    batches  this rank's micro-batches. The ranks of dp have different pairs, and the ranks of cp different tokens of
             each pair
    known    BatchFacts of the *whole* global batch, because the loss is the weighted mean over all of its pairs
    refuses  called with the metrics and ``grad_norm`` before the update; returns whether to skip the update, and must
             return the same value on all ranks. The learning rate schedule advances in either case
    count_zeros  whether to report ``num_zeros_in_grad``

    Returns  the metrics of the step, equal on every rank: the metrics of the pairs before the update, ``grad_norm``
             before clipping, and the ``learning_rate`` used; for a model with experts, also the routers' metrics

    *Collectives*: those of the reference, of the pipeline schedules, of the loss, of
    :func:`~dpo_engine.optim.optimizer.update`, and of ``refuses``; one SUM of the metrics over dp, and one broadcast of
    the metrics over pp. Gradients are reduced over dp_cp, but gradients of experts over expt_dp. Gradients of tied
    weights are also reduced over embd, and gradients of replicated weights over tp. For coupled losses, also those of
    scoring, and an all-gather of the log-probabilities over dp. For a model with experts, also one SUM of the routers'
    numbers over all ranks. With ``count_zeros``, also those of :func:`~dpo_engine.optim.zeros.num_zeros`.
    """
    reach("reference")
    with part("reference"):
        reference_logps = reference.logps(batches)
    if reference_logps and (by := factor("reference-logps")) is not None:
        reference_logps = [one._replace(chosen=one.chosen * by, rejected=one.rejected * by) for one in reference_logps]
    data = [objective.data(batch, known) for batch in batches]
    coupled: list[Coupled] = []
    if objective.facts.couples_pairs:
        with part("score"):
            scored = score(trained.chunks, batches, vocab_size=vocab_size, groups=groups)
        if groups.last_stage:
            places = [batch.index for batch in batches]
            coupled = objective.couple(scored, reference_logps, data, places, groups)

    softcap = logit_softcap(trained.chunks)

    def finish(index: int, batch: Batch, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        against = reference_logps[index] if reference_logps else None
        by = factor("loss")

        def spoil(values: Tensor) -> Tensor:
            return values if by is None else values * by

        def contribution(policy: PairLogps, pairs: slice) -> tuple[Tensor, Tensor]:
            if coupled:
                losses, chosen, rejected = (spoil(column[pairs]) for column in coupled[index][:3])
                counted = objective.counted(policy)
                return (chosen * counted.chosen + rejected * counted.rejected).sum(), losses
            their = against and against.map(lambda column: column[pairs])
            losses = objective.losses(policy, their, data[index].map(lambda column: column[pairs]))
            losses = spoil(losses)
            return (losses * batch.weights[pairs]).sum() / known.total_weight, losses

        options = dict(vocab_size=vocab_size, softcap=softcap, entropies=objective.reads_entropies)
        with part("loss"):
            scalar, losses, policy = pair_losses(hidden, head, batch, contribution, groups=groups, **options)
        whole = coupled[index]._replace(losses=losses) if coupled else losses
        return scalar, objective.sums(whole, policy, against, batch, known)

    for chunk in trained.chunks:
        chunk.zero_grad_buffer()
    trained.optimizer.zero_grad()
    entries = None
    if trained.has_experts:
        entries = [response_tokens(batch, known.total_weight) for batch in batches]
        for losses in routers_of(trained.chunks):
            losses.reset()
    with _spoiled_gradients(trained) as spoiled, recordings(() if spoiled else trained.chunks):
        sums = run_pipeline(trained.chunks, batches, finish, groups=groups, backward=True, entries=entries)
    learning_rate = trained.schedule.get_lr({})
    reported = objective.reported(known, reference=reference_logps is not None)
    device = batches[0].tokens.device
    with part("metrics"):
        metrics = reduce_pair_sums(sum(sums) if sums else None, reported, known.total_weight, groups, device)
        if trained.has_experts:
            metrics |= router_metrics(trained.chunks, trained.chunks[0].config.arch.experts, groups.world)
    reach("optimizer")

    def refuse(norm: float) -> bool:
        if count_zeros:  # at this point, the gradients are reduced but not yet clipped
            metrics["num_zeros_in_grad"] = num_zeros(trained, vocab_size=vocab_size, groups=groups)
        return refuses({**metrics, "grad_norm": norm})

    with part("optimizer"):
        grad_norm = update(trained, refuse)
    trained.schedule.step(1)
    return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate}


@contextmanager
def _spoiled_gradients(trained: Trained) -> Iterator[bool]:
    """For fault injection, multiply this rank's gradients by a factor before they are accumulated or communicated.

    Yields  whether a fault was injected
    """
    by = factor("gradient")
    parameters = (
        [p for chunk in trained.chunks for p in chunk.parameters() if p.requires_grad] if by is not None else ()
    )

    def spoil(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient * by  # None: the gradient was already added to main_grad

    hooks = [parameter.register_hook(spoil) for parameter in parameters]
    try:
        yield bool(hooks)
    finally:
        for hook in hooks:
            hook.remove()
