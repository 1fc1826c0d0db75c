"""The run's loss with its options: what a step differentiates and what it reports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.errors import ConfigError
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
from dpo_engine.training.metrics import Reported, pair_sums

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
