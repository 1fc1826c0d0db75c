"""One optimiser step over one global batch of pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.errors import ConfigError
from dpo_engine.faults import factor, reach
from dpo_engine.model.pipeline import run_pipeline
from dpo_engine.objective.losses import (
    PairData,
    PairLogps,
    apply_loss,
    loss_coefficients,
    loss_facts,
    per_token,
    rewards,
    with_defaults,
)
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import pair_losses
from dpo_engine.scoring.reference import Reference, score
from dpo_engine.training.metrics import Reported, pair_sums, reduce_pair_sums
from dpo_engine.training.optimizer import Trained, update

LOSS_READS = 4
"""Leading fields of :class:`PairLogps` that a loss reads: the sums and the numbers of tokens."""


class BatchFacts(NamedTuple):
    """What is known of a whole global batch before anything is scored, the same on every rank.

    total_weight        sum of the weights of all pairs: every mean is over it
    mean_chosen_tokens  tokens of a chosen response, in the weighted mean
    sources             names of the files that the pairs of its data set come from, in the order of ``Batch.source``
    """

    total_weight: float
    mean_chosen_tokens: float
    sources: tuple[str, ...] = ()


class Coupled(NamedTuple):
    """One micro-batch's part of a loss that couples all pairs of the global batch.

    losses            [b]  the pairs' losses
    chosen, rejected  [b]  derivatives of the global batch's mean loss by the summed log-probabilities
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


class Objective:
    """A loss with its options filled in: what the step differentiates and what it reports.

    ld_alpha       factor of log-probabilities beyond the length of the pair's shorter response; None: all count alike
    use_weighting  each pair's loss is multiplied by :meth:`likelihoods`
    entropy        whether the policy's entropy is reported

    *Source*: ld_alpha: LD-DPO (arXiv 2409.06411), under the reference too, as TRL has it; use_weighting: WPO (arXiv
    2406.11827) eq. 2, with its alignment to the policy's own samples.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        options: Mapping[str, Any],
        *,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        entropy: bool = False,
    ):
        self.loss = loss
        self.options = with_defaults(loss, options)
        facts = loss_facts(loss, self.options)
        self.facts = facts._replace(at_init=None) if use_weighting else facts
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.entropy = entropy

    @property
    def reads_entropies(self) -> bool:
        """Whether the policy has to be scored with its entropies."""
        return self.use_weighting or self.entropy

    def data(self, batch: Batch, known: BatchFacts) -> PairData:
        """The columns of a micro-batch that a loss may read."""
        mean = torch.full_like(batch.weights, known.mean_chosen_tokens)
        return PairData(batch.weights, batch.margins, batch.chosen_rewards, batch.rejected_rewards, mean)

    def counted(self, logps: PairLogps) -> PairLogps:
        """The log-probabilities as the loss counts them: those beyond the shorter response's length by ``ld_alpha``.

        Raises :class:`~dpo_engine.errors.ConfigError` where only whole sums are known.
        """
        if self.ld_alpha is None:
            return logps
        if logps.chosen_shared is None or logps.rejected_shared is None:
            raise ConfigError(
                f"loss.ld_alpha={self.ld_alpha}: needs log-probabilities of the tokens that both responses have, and "
                "the reference's are sums of whole responses; leave it out, or set reference.mode=resident"
            )
        return logps._replace(
            chosen=logps.chosen_shared + self.ld_alpha * (logps.chosen - logps.chosen_shared),
            rejected=logps.rejected_shared + self.ld_alpha * (logps.rejected - logps.rejected_shared),
        )

    @staticmethod
    def likelihoods(policy: PairLogps) -> Tensor:
        """How likely the policy is to write both responses of a pair, per token and relative to its own samples.

        Returns  [b]  without gradient: of each response ``exp(mean(log p - log sum_v p_v^2))``, both multiplied
        """
        means = per_token(policy, policy.chosen + policy.chosen_collision, policy.rejected + policy.rejected_collision)
        return sum(means).detach().exp()

    def losses(self, policy: PairLogps, reference: PairLogps | None, data: PairData) -> Tensor:
        """The pairs' losses [b], 0 in places without a pair; not for a loss that couples pairs."""
        against = reference and self.counted(reference)
        losses = apply_loss(self.loss, self.counted(policy), against, data, self.options)
        if losses.shape != data.weights.shape:
            raise ConfigError(
                f"loss.name: the loss gave {list(losses.shape)} for {len(data.weights)} pairs; it must return one "
                "value per pair, without summing or averaging"
            )
        if self.use_weighting:
            losses = losses * self.likelihoods(policy)
        return torch.where(data.weights > 0, losses, 0.0)

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Chosen and rejected rewards [b] as the loss reads log-probabilities, averaged and counted alike."""
        against = reference and self.counted(reference)
        return rewards(self.counted(policy), against, self.facts.reward_scale, average=self.facts.per_token_rewards)

    def reported(self, known: BatchFacts, *, reference: bool) -> Reported:
        """The metrics of a global batch."""
        return Reported(reference=reference, entropy=self.entropy, sources=known.sources)

    def sums(
        self, losses: Tensor, policy: PairLogps, reference: PairLogps | None, batch: Batch, known: BatchFacts
    ) -> Tensor:
        """A micro-batch's metric sums; see :func:`~dpo_engine.training.metrics.pair_sums`."""
        policy = policy.map(Tensor.detach)
        gained = self.rewards(policy, reference)
        reported = self.reported(known, reference=reference is not None)
        return pair_sums(reported, losses.detach(), gained, policy, reference, batch.weights, batch.source)

    def couple(
        self,
        policy: Sequence[PairLogps],
        reference: Sequence[PairLogps] | None,
        data: Sequence[PairData],
        groups: ParallelGroups,
    ) -> list[Coupled]:
        """A coupled loss over the whole global batch, and this rank's part of it by micro-batch.

        policy, reference, data   of this rank's micro-batches, already scored; called on the last stage only

        *Collectives*: one all-gather over dp of every column, ``[columns, pairs of a rank]``.
        """
        mine = []
        for logps in (policy, reference or ()):
            read = [self.counted(record)[:LOSS_READS] for record in logps]
            mine += [torch.cat(columns) for columns in zip(*read, strict=True)]
        mine += [torch.cat(columns) for columns in zip(*data, strict=True)]
        columns = torch.stack([column.to(mine[0].dtype) for column in mine], dim=1)  # [pairs of a rank, columns]
        everyone = columns.new_empty((groups.dp.size() * columns.shape[0], columns.shape[1]))
        dist.all_gather_into_tensor(everyone, columns.contiguous(), group=groups.dp)
        parts = list(everyone.T)
        policy_all, rest = PairLogps(*parts[:LOSS_READS]), parts[LOSS_READS:]
        reference_all = PairLogps(*rest[:LOSS_READS]) if reference else None
        data_all = PairData(*rest[-len(PairData._fields) :])
        present = data_all.weights > 0
        found = loss_coefficients(
            self.loss,
            policy_all.map(lambda column: column[present]),
            reference_all and reference_all.map(lambda column: column[present]),
            data_all.map(lambda column: column[present]),
            self.options,
        )
        start = groups.dp.rank() * columns.shape[0]
        own = [torch.zeros_like(data_all.weights).masked_scatter(present, part) for part in found]
        own = [part[start : start + columns.shape[0]] for part in own]
        sizes = [len(record.weights) for record in data]
        return [Coupled(*split) for split in zip(*(part.split(sizes) for part in own), strict=True)]


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
