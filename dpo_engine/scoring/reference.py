"""Where the reference's log-probabilities come from. One method; the step does not know which kind it holds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.model.pipeline import run_pipeline
from dpo_engine.model.policy import await_weights
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import pair_logps
from dpo_engine.scoring.store import VALUES, Rows, keys

Chunks = Sequence[torch.nn.Module]


class Reference(Protocol):
    """Gives the reference's log-probabilities of micro-batches before the policy sees them.

    age   how often its weights have changed; what was scored at another age is of no use
    """

    age: int

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps] | None:
        """One record per micro-batch on the last stage, an empty list on other stages, ``None`` without a reference."""
        ...


@torch.no_grad()
def score(
    chunks: Chunks,
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

    def finish(index: int, batch: Batch, hidden: Tensor, head: Tensor) -> tuple[Tensor, Any]:
        found = pair_logps(hidden, head, batch, vocab_size=vocab_size, groups=groups, entropies=entropies)
        return hidden.new_zeros(()), found

    return run_pipeline(chunks, batches, finish, groups=groups, backward=False)


class ResidentReference:
    """A frozen model beside the policy, cut the same way and run by the same code."""

    def __init__(self, chunks: Chunks, *, vocab_size: int, groups: ParallelGroups):
        for chunk in chunks:
            chunk.requires_grad_(False)
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """One forward pass per micro-batch."""
        return score(self.chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    @torch.no_grad()
    def follow(self, policy: Chunks, alpha: float) -> None:
        """Move the reference towards the policy: ``alpha policy + (1 - alpha) reference``.

        policy   this rank's chunks of the policy, cut as the reference is

        *Source*: TR-DPO (arXiv 2404.09656), the soft update; the hard one is ``alpha`` 1.
        """
        await_weights(policy)
        for mine, its in zip(parameters(self.chunks), parameters(policy), strict=True):
            set_exact(mine, torch.lerp(exact(mine), its.float(), alpha))
        self.age += 1


def exact(parameter: Tensor) -> Tensor:
    """A following reference's parameter in fp32, unrounded."""
    return getattr(parameter, "exact", parameter).float()


@torch.no_grad()
def set_exact(parameter: Tensor, value: Tensor) -> None:
    """Give a following reference's parameter a value [its shape] fp32, which is kept where the parameter rounds it.

    Small moves would be lost otherwise: half a unit in the last place of bf16 is a fifth of a percent.
    """
    if parameter.dtype is not torch.float32:
        parameter.exact = value
    parameter.copy_(value)


class HostWeights:
    """A second set of weights for the model on the device, in host memory, exchanged with the first when it is needed.

    No more than one parameter is on the device twice.

    chunks   the model whose weights are exchanged
    pinned   whether host memory is page-locked, for faster copies; possible with a GPU only
    """

    def __init__(self, chunks: Chunks, *, pinned: bool):
        self.chunks = list(chunks)
        self._host = [
            torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pinned).copy_(parameter.detach())
            for parameter in parameters(self.chunks)
        ]

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the host's weights on the device, and the device's into host memory."""
        await_weights(self.chunks)
        for parameter, host in zip(parameters(self.chunks), self._host, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(host)
            host.copy_(before)

    @contextmanager
    def on_device(self) -> Iterator[Chunks]:
        """The model with the host's weights, for as long as the context lasts."""
        self.exchange()
        try:
            yield self.chunks
        finally:
            self.exchange()


class OffloadedReference:
    """One set of weights on the device: the reference's come from host memory to score many batches ahead at once.

    weights    the reference's, in the policy's place when exchanged
    upcoming   this rank's micro-batches of the coming optimiser steps, step by step, the next one first
    """

    def __init__(
        self,
        weights: HostWeights,
        upcoming: Callable[[], Iterable[Sequence[Batch]]],
        *,
        vocab_size: int,
        groups: ParallelGroups,
    ):
        self.weights = weights
        self.upcoming = upcoming
        self.vocab_size = vocab_size
        self.groups = groups
        self.age = 0
        self._ready: dict[bytes, list[PairLogps]] = {}

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """What was scored ahead; where nothing was, the weights are exchanged and all that is coming is scored too."""
        wanted = _name(batches)
        if wanted not in self._ready:
            with self.weights.on_device() as chunks:
                self._score(chunks, batches)
                for coming in self.upcoming():
                    self._score(chunks, coming)
        return self._ready.pop(wanted)

    def _score(self, chunks: Chunks, batches: Sequence[Batch]) -> None:
        name = _name(batches)
        if name not in self._ready:
            self._ready[name] = score(chunks, batches, vocab_size=self.vocab_size, groups=self.groups)


def _name(batches: Sequence[Batch]) -> bytes:
    """A name for micro-batches: equal when they hold the same pairs in the same places."""
    return b"|".join(batch.digest.cpu().numpy().tobytes() for batch in batches)


class StoredReference:
    """Log-probabilities that were scored before, by pair; no second model anywhere.

    rows   of every pair that will be asked for
    """

    def __init__(self, rows: Rows, *, groups: ParallelGroups):
        self.rows = rows
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """The stored values. Raises ``KeyError`` for a pair that is not among them."""
        return [self._of(batch) for batch in batches] if self.groups.last_stage else []

    def _of(self, batch: Batch) -> PairLogps:
        found = self.rows.find(keys(batch.digest.cpu().numpy()))
        present = batch.index.cpu().numpy() >= 0
        if (found[present] < 0).any():
            raise KeyError(f"{int((found[present] < 0).sum())} pairs of a batch have no stored log-probabilities")
        values = np.zeros((len(found), len(VALUES)), dtype=np.float32)
        values[present] = self.rows.values[found[present]]
        chosen, rejected, *shared = torch.from_numpy(values).to(batch.weights.device).unbind(1)
        return PairLogps(chosen, rejected, batch.chosen_tokens, batch.rejected_tokens, *shared)


class DatasetReference:
    """Log-probabilities that came with the records."""

    def __init__(self, *, groups: ParallelGroups):
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """The columns of the batches; whole sums only."""
        if not self.groups.last_stage:
            return []
        return [
            PairLogps(batch.ref_chosen_logps, batch.ref_rejected_logps, batch.chosen_tokens, batch.rejected_tokens)
            for batch in batches
        ]


class NoReference:
    """For losses that compare the policy with nothing."""

    age = 0

    def logps(self, batches: Sequence[Batch]) -> None:
        """Nothing to score."""


def parameters(chunks: Chunks) -> list[Tensor]:
    """The parameters of this rank's chunks, in the same order for policy and reference."""
    return [parameter for chunk in chunks for parameter in chunk.parameters()]
