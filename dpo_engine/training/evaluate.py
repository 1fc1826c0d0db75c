"""Evaluation over every held-out pair, the ragged end included."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.reference import Reference, score
from dpo_engine.training.metrics import reduce_pair_sums
from dpo_engine.training.step import BatchFacts, Objective


class Evaluator:
    """Held-out pairs, dealt once; a reference whose weights stay scores them once, at the first evaluation.

    batches  this rank's micro-batches of the whole held-out set
    known    facts of the whole held-out set
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        reference: Reference,
        objective: Objective,
        *,
        known: BatchFacts,
        vocab_size: int,
        groups: ParallelGroups,
    ):
        self.batches = batches
        self.reference = reference
        self.objective = objective
        self.known = known
        self.vocab_size = vocab_size
        self.groups = groups
        self._reference_logps: list[PairLogps] | None = None
        self._scored_at: int | None = None
        self._latest: list[PairLogps] = []

    @torch.no_grad()
    def evaluate(self, chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
        """Metrics of the policy ``chunks`` over all held-out pairs, equal on every rank.

        *Collectives*: those of the forward passes; one SUM over dp and one broadcast over pp.
        """
        if self._scored_at != self.reference.age:
            self._reference_logps = self.reference.logps(self.batches)
            self._scored_at = self.reference.age
        entropies = self.objective.reads_entropies
        self._latest = score(chunks, self.batches, vocab_size=self.vocab_size, groups=self.groups, entropies=entropies)
        sums = self._pair_sums(self._latest) if self.groups.last_stage else None
        reported = self.objective.reported(self.known, reference=self._reference_logps is not None)
        device = self.batches[0].tokens.device
        return reduce_pair_sums(sums, reported, self.known.total_weight, self.groups, device)

    def _pair_sums(self, policy: Sequence[PairLogps]) -> Tensor:
        """Metric sums over this rank's pairs; on the last stage."""
        objective, reference = self.objective, self._reference_logps
        data = [objective.data(batch, self.known) for batch in self.batches]
        if objective.facts.couples_pairs:
            losses = [part.losses for part in objective.couple(policy, reference, data, self.groups)]
        else:
            against = reference or [None] * len(policy)
            losses = [objective.losses(*parts) for parts in zip(policy, against, data, strict=True)]
        sums = [
            objective.sums(loss, scored, reference[i] if reference else None, self.batches[i], self.known)
            for i, (loss, scored) in enumerate(zip(losses, policy, strict=True))
        ]
        return torch.stack(sums).sum(0)

    def per_pair(self) -> list[dict[str, Any]]:
        """Log-probabilities of the latest evaluation by pair, in the order of the held-out set, on every rank.

        *Collectives*: one gather of objects over all ranks.
        """
        mine = []
        if self.groups.last_stage and self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0:
            for position, (policy, batch) in enumerate(zip(self._latest, self.batches, strict=True)):
                reference = self._reference_logps[position] if self._reference_logps else None
                for place, index in enumerate(batch.index.tolist()):
                    if index >= 0:
                        row = {"index": index, "chosen": policy.chosen[place], "rejected": policy.rejected[place]}
                        if reference is not None:
                            row["reference_chosen"] = reference.chosen[place]
                            row["reference_rejected"] = reference.rejected[place]
                        mine.append({key: value if key == "index" else value.item() for key, value in row.items()})
        everyone: list[Any] = [None] * self.groups.world.size()
        dist.all_gather_object(everyone, mine, group=self.groups.world)
        return sorted((row for rows in everyone for row in rows), key=lambda row: row["index"])
