"""Apply the run's loss with its options: compute the losses of the pairs, and the metrics that a step reports.

`Objective` is the only caller of loss functions during training and evaluation. There are two cases:

- A loss that treats each pair on its own: `Objective.losses` returns the losses of one micro-batch. The step divides
  their weighted sum by the total weight of the *global* batch, so the result does not depend on the layout.
- A loss that couples the pairs of a global batch: `Objective.couple` computes it from the log-probabilities of all
  pairs at once. It returns the losses, and the derivatives that the second pass of the step uses as coefficients (see
  :mod:`~dpo_engine.training.step`).

How `couple` works: each rank packs all columns that the loss reads into one matrix with one row per pair. One
all-gather over dp gives every rank the same rows in the same order. Every rank therefore computes the same loss without
further communication, and the result is deterministic. Before the loss is called, rows of weight 0, which are padding,
are removed, and the other rows are sorted by the pairs' indices in the data set. Finally, each rank takes its own rows
and splits them by micro-batch. The matrix holds only a few numbers per pair, so computing the loss on every rank is
cheaper than a distributed sort.

Not covered: `couple` runs on the last pipeline stage only. Of the fields of
:class:`~dpo_engine.objective.losses.PairLogps`, it gathers only the first `LOSS_READS`. A coupled loss that reads more
fields would need more columns.
"""

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
"""Number of fields of :class:`PairLogps` that a loss reads. These are the first fields: summed log-probabilities and
token counts."""


class BatchFacts(NamedTuple):
    """Properties of a whole global batch that are known before scoring, equal on every rank.

    total_weight        sum of the weights of all pairs; the denominator of the means over all pairs
    mean_chosen_tokens  weighted mean of the number of tokens in a chosen response
    sources             names of the data set's sources; ``Batch.source`` is an index into this tuple
    tie                 largest difference of log-probabilities that counts as a tie in the accuracies of rewards and in
                        ``displacement/chosen_fell``, relative to the sum of the absolute values of the policy's two
                        log-probabilities; 0: only equal values are a tie
    """

    total_weight: float
    mean_chosen_tokens: float
    sources: tuple[str, ...] = ()
    tie: float = 0.0


class Coupled(NamedTuple):
    """One micro-batch's part of a loss that couples all pairs in the global batch.

    losses            [b]  the pairs' losses
    chosen, rejected  [b]  derivatives of the global batch's mean loss with respect to the summed log-probabilities of
                           the chosen and the rejected response
    parts             the loss's terms in the order of ``LossFacts.parts``, [b] each
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor
    parts: tuple[Tensor, ...] = ()


class Objective:
    """A loss with its options, the token weighting, and the metrics to report.

    ld_alpha       factor for the log-probabilities of tokens beyond the length of the pair's shorter response; None: 1
    use_weighting  whether to multiply each pair's loss by its weight from :meth:`likelihoods`
    entropy        whether to report the policy's entropy

    *Source*: ``ld_alpha``: LD-DPO (arXiv 2409.06411); as in TRL, the factor applies to the policy and to the reference.
    ``use_weighting``: WPO (arXiv 2406.11827) eq. 2, with the paper's "sampled alignment".
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
        """Whether scoring the policy must also return entropies."""
        return self.use_weighting or self.entropy

    def data(self, batch: Batch, known: BatchFacts) -> PairData:
        """Return the columns of a micro-batch that a loss can read."""
        mean = torch.full_like(batch.weights, known.mean_chosen_tokens)
        return PairData(batch.weights, batch.margins, batch.chosen_rewards, batch.rejected_rewards, mean)

    def counted(self, logps: PairLogps) -> PairLogps:
        """Apply ``ld_alpha``: scale the log-probabilities of tokens beyond the shorter response's length.

        Raises :class:`~dpo_engine.errors.ConfigError` if only sums over whole responses are known.
        """
        if self.ld_alpha is None:
            return logps
        if logps.chosen_shared is None or logps.rejected_shared is None:
            raise ConfigError(
                f"loss.ld_alpha={self.ld_alpha}: needs the log-probabilities of each response up to the length of the "
                "shorter response, but the reference provides only sums over whole responses; remove loss.ld_alpha, or "
                "set reference.mode=resident"
            )
        return logps._replace(
            chosen=logps.chosen_shared + self.ld_alpha * (logps.chosen - logps.chosen_shared),
            rejected=logps.rejected_shared + self.ld_alpha * (logps.rejected - logps.rejected_shared),
        )

    @staticmethod
    def likelihoods(policy: PairLogps) -> Tensor:
        """Return WPO's weights: the normalized likelihood per token of both responses.

        The likelihood ``p`` of a token is divided by ``sum_v p_v^2``, the expected likelihood of a token that is
        sampled from the policy.

        Returns  [b]  the product over both responses of ``exp(mean(log p - log sum_v p_v^2))``, without gradient; the
                 mean is over the response's tokens, and the sum over the vocabulary
        """
        means = per_token(policy, policy.chosen + policy.chosen_collision, policy.rejected + policy.rejected_collision)
        return sum(means).detach().exp()

    def losses(self, policy: PairLogps, reference: PairLogps | None, data: PairData) -> Tensor:
        """Return the pairs' losses [b], 0 for padding. Do not call this for a loss that couples pairs.

        Raises :class:`~dpo_engine.errors.ConfigError` if the loss does not return one value per pair.
        """
        against = reference and self.counted(reference)
        losses = apply_loss(self.loss, self.counted(policy), against, data, self.options)
        if losses.shape != data.weights.shape:
            raise ConfigError(
                f"loss.name: the loss returned shape {list(losses.shape)}, but the number of pairs is "
                f"{len(data.weights)}; the loss must return one value per pair, without summing or averaging"
            )
        if self.use_weighting:
            losses = losses * self.likelihoods(policy)
        return torch.where(data.weights > 0, losses, 0.0)

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Return the chosen and the rejected rewards, [b] each, with the loss's scale and ``ld_alpha``."""
        against = reference and self.counted(reference)
        return rewards(self.counted(policy), against, self.facts.reward_scale)

    def tolerance(self, policy: PairLogps, known: BatchFacts) -> Tensor:
        """Return the largest difference of log-probabilities that counts as a tie, in nats, [b]."""
        return known.tie * (policy.chosen.abs() + policy.rejected.abs())

    def reported(self, known: BatchFacts, *, reference: bool) -> Reported:
        """Return which metrics to report for a global batch."""
        facts = {"averages": self.facts.averages, "parts": tuple(self.facts.parts)}
        return Reported(reference=reference, entropy=self.entropy, sources=known.sources, **facts)

    def parts(self, policy: PairLogps, reference: PairLogps | None, data: PairData) -> list[Tensor]:
        """Return the terms of :meth:`losses`, [b] each. Do not call this for a loss that couples pairs."""
        policy, counted = self.counted(policy), policy
        terms = [term(policy, reference and self.counted(reference), data) for term in self.facts.parts.values()]
        if self.use_weighting:
            terms = [term * self.likelihoods(counted) for term in terms]
        return [torch.where(data.weights > 0, term, 0.0) for term in terms]

    def sums(
        self,
        losses: Tensor | Coupled,
        policy: PairLogps,
        reference: PairLogps | None,
        batch: Batch,
        known: BatchFacts,
    ) -> Tensor:
        """Return a micro-batch's metric sums; see :func:`~dpo_engine.training.metrics.pair_sums`.

        losses  the pairs' losses [b], or the micro-batch's part of a coupled loss
        """
        policy = policy.map(Tensor.detach)
        if isinstance(losses, Coupled):
            losses, parts = losses.losses, losses.parts
        else:
            parts = self.parts(policy, reference, self.data(batch, known)) if self.facts.parts else ()
        gained = self.rewards(policy, reference)
        reported = self.reported(known, reference=reference is not None)
        rest = {"scale": self.facts.reward_scale, "tolerance": self.tolerance(policy, known), "parts": parts}
        return pair_sums(reported, losses.detach(), gained, policy, reference, batch.weights, batch.source, **rest)

    def couple(
        self,
        policy: Sequence[PairLogps],
        reference: Sequence[PairLogps] | None,
        data: Sequence[PairData],
        places: Sequence[Tensor],
        groups: ParallelGroups,
    ) -> list[Coupled]:
        """Compute a coupled loss over the whole global batch. Call on the last stage only.

        policy, reference   log-probabilities of this rank's pairs, one record per micro-batch
        data                the other columns that a loss can read, one record per micro-batch
        places              indices of this rank's pairs in the data set, one tensor [b] per micro-batch. The loss gets
                            the pairs sorted by index, so that pairs with equal values have the same order in every
                            layout

        Returns  this rank's part of the loss, one record per micro-batch

        *Collectives*: one all-gather over dp of all columns, ``[pairs of a rank, columns]``.
        """
        mine = []
        for logps in (policy, reference or ()):
            read = [self.counted(record)[:LOSS_READS] for record in logps]
            mine += [torch.cat(columns) for columns in zip(*read, strict=True)]
        mine += [torch.cat(columns) for columns in zip(*data, strict=True)]
        dtype, mine = mine[0].dtype, [*mine, torch.cat(list(places))]
        columns = torch.stack([column.double() for column in mine], dim=1)  # [pairs of a rank, columns]; fp64 is exact
        everyone = columns.new_empty((groups.dp.size() * columns.shape[0], columns.shape[1]))
        dist.all_gather_into_tensor(everyone, columns.contiguous(), group=groups.dp)
        *parts, place = everyone.T
        parts = [part.to(dtype) for part in parts]
        policy_all, rest = PairLogps(*parts[:LOSS_READS]), parts[LOSS_READS:]
        reference_all = PairLogps(*rest[:LOSS_READS]) if reference else None
        data_all = PairData(*rest[-len(PairData._fields) :])
        order = place.argsort(stable=True)
        order = order[data_all.weights[order] > 0]
        read = [record and record.map(lambda column: column[order]) for record in (policy_all, reference_all, data_all)]
        found = [*loss_coefficients(self.loss, *read, self.options)]
        found += [term(*read) for term in self.facts.parts.values()]
        start = groups.dp.rank() * columns.shape[0]
        own = [torch.zeros_like(data_all.weights).index_copy(0, order, part) for part in found]
        own = [part[start : start + columns.shape[0]] for part in own]
        sizes = [len(record.weights) for record in data]
        return [Coupled(*split[:3], split[3:]) for split in zip(*(part.split(sizes) for part in own), strict=True)]
