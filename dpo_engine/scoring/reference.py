"""Where the reference's log-probabilities come from. One method; the step does not know which kind it holds."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_engine.data.batches import Batch
from dpo_engine.model.pipeline import run_pipeline
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import pair_logps


class Reference(Protocol):
    """Gives the reference's log-probabilities of micro-batches before the policy sees them."""

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps] | None:
        """One record per micro-batch on the last stage, an empty list on other stages, ``None`` without a reference."""
        ...


@torch.no_grad()
def score(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    *,
    vocab_size: int,
    groups: ParallelGroups,
    entropies: bool = False,
) -> list[PairLogps]:
    """Log-probabilities of micro-batches under ``chunks``, and entropies where asked; forward only.

    Returns  one record per micro-batch on the last stage, an empty list on the others

    *Collectives*: the pipeline's point-to-point sends, and those of :func:`~dpo_engine.scoring.logps.pair_logps`.
    """

    def finish(index: int, batch: Batch, logits: Tensor) -> tuple[Tensor, Any]:
        found = pair_logps(logits, batch, vocab_size=vocab_size, groups=groups, entropies=entropies)
        return logits.new_zeros(()), found

    return run_pipeline(chunks, batches, finish, groups=groups, backward=False)


class ResidentReference:
    """A frozen model beside the policy, cut the same way and run by the same code."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, vocab_size: int, groups: ParallelGroups):
        for chunk in chunks:
            chunk.requires_grad_(False)
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.groups = groups

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """One forward pass per micro-batch."""
        return score(self.chunks, batches, vocab_size=self.vocab_size, groups=self.groups)


class NoReference:
    """For losses that compare the policy with nothing."""

    def logps(self, batches: Sequence[Batch]) -> None:
        """Nothing to score."""
