"""Provide the reference's log-probabilities from different sources (models, stores, records) through one interface."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.model.adapters import AdapterValues, adapters_off
from dpo_engine.model.pipeline import logit_softcap, run_pipeline
from dpo_engine.model.policy import await_weights
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import pair_logps
from dpo_engine.scoring.store import VALUES, Rows, keys
from dpo_engine.scoring.tokens import score_sites
from dpo_kernels.transfer import to_device

Chunks = Sequence[torch.nn.Module]


class Reference(Protocol):
    """A source of the reference's log-probabilities, called before the policy runs on the same micro-batches.

    age     number of times that the reference's weights have changed; log-probabilities from another age are stale
    passes  number of forward passes of the reference model over the pairs of a step
    """

    age: int
    passes: int

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps] | None:
        """Return one :class:`PairLogps` per micro-batch on the last stage, and an empty list on the other stages.

        Returns ``None`` if there is no reference.
        """
        ...

    def site_logps(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """Return the log-probability of each scored site, as :func:`~dpo_engine.scoring.tokens.score_sites` does.

        Returns ``None`` if only sums over responses are known, or if there is no reference.
        """
        ...


@torch.no_grad()
def score(
    chunks: Chunks, batches: Sequence[Batch], *, vocab_size: int, groups: ParallelGroups, entropies: bool = False
) -> list[PairLogps]:
    """Compute the responses' log-probabilities (and optionally entropies) with a forward pass of the model ``chunks``.

    Returns  one :class:`PairLogps` per micro-batch on the last stage, and an empty list on the other stages

    *Collectives*: those of :func:`~dpo_engine.scoring.logps.pair_logps`; also the pipeline's point-to-point transfers.
    """
    options = {"vocab_size": vocab_size, "softcap": logit_softcap(chunks), "entropies": entropies}

    def finish(index: int, batch: Batch, hidden: Tensor, head: Tensor) -> tuple[Tensor, Any]:
        found = pair_logps(hidden, head, batch, groups=groups, **options)
        return hidden.new_zeros(()), found

    return run_pipeline(chunks, batches, finish, groups=groups, backward=False)


class ResidentReference:
    """A frozen model in device memory next to the policy. It is sharded like the policy and run by the same code."""

    passes = 1

    def __init__(self, chunks: Chunks, *, vocab_size: int, groups: ParallelGroups):
        for chunk in chunks:
            chunk.requires_grad_(False)
        self.chunks = list(chunks)
        self.vocab_size = vocab_size
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """Score the responses with one forward pass per micro-batch."""
        return score(self.chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    def site_logps(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Score each site with one forward pass per micro-batch."""
        return score_sites(self.chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    @torch.no_grad()
    def follow(self, policy: Chunks, alpha: float) -> None:
        """Move the reference toward the policy: ``alpha * policy + (1 - alpha) * reference``.

        policy   this rank's chunks of the policy, sharded like the reference

        *Collectives*: those of :func:`~dpo_engine.model.policy.await_weights`.
        *Source*: TR-DPO (arXiv 2404.09656), the soft update. With ``alpha=1``, this is the hard update.
        """
        await_weights(policy)
        for mine, its in zip(parameters(self.chunks), parameters(policy), strict=True):
            set_exact(mine, torch.lerp(exact(mine), its.float(), alpha))
        self.age += 1


def exact(parameter: Tensor) -> Tensor:
    """Return a reference's parameter in fp32; after :func:`set_exact`, this is exactly the value that was set."""
    return getattr(parameter, "exact", parameter).float()


@torch.no_grad()
def set_exact(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter of a periodically updated reference to an fp32 value of the same shape.

    If the parameter's dtype is not fp32, its attribute ``exact`` also holds the fp32 value. Without this attribute,
    small updates would be lost to rounding: half a unit in the last place of bf16 is 0.2 to 0.4 percent of the value.
    """
    if parameter.dtype is not torch.float32:
        parameter.exact = value
    parameter.copy_(value)


class SharedReference:
    """The policy's own model, without adapters or with an earlier state of its adapter.

    chunks   the policy's chunks
    start    values of the reference's adapter, one item for each chunk: at first the values that the run started from,
             and later the policy's values that :meth:`follow` has copied; None: adapters are turned off
    """

    passes = 1

    def __init__(self, chunks: Chunks, start: list[AdapterValues] | None, *, vocab_size: int, groups: ParallelGroups):
        self.chunks = list(chunks)
        self.start = start
        self.vocab_size = vocab_size
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """Score the responses with one forward pass per micro-batch."""
        with adapters_off(self.chunks) if self.start is None else self._started():
            return score(self.chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    def site_logps(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Score each site with one forward pass per micro-batch."""
        with adapters_off(self.chunks) if self.start is None else self._started():
            return score_sites(self.chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    @contextmanager
    def _started(self) -> Iterator[None]:
        await_weights(self.chunks)
        for values in self.start:
            values.exchange()
        try:
            yield
        finally:
            for values in self.start:
                values.exchange()

    def follow(self, policy: Chunks, alpha: float) -> None:
        """Make the reference a copy of the policy (``alpha`` must be 1): TR-DPO's hard update.

        *Collectives*: those of :func:`~dpo_engine.model.policy.await_weights`. *Source*: TR-DPO (arXiv 2404.09656).
        """
        await_weights(policy)
        for values in self.start:
            values.read()
        self.age += 1


class HostWeights:
    """A second set of weights in host memory that can be swapped with the model's weights on the device.

    Swapping needs additional device memory for only one parameter at a time.

    chunks   the model whose weights are swapped
    pinned   whether host memory is page-locked, for faster copies; requires a GPU
    """

    def __init__(self, chunks: Chunks, *, pinned: bool):
        self.chunks = list(chunks)
        self._host = [
            torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pinned).copy_(parameter.detach())
            for parameter in parameters(self.chunks)
        ]

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the weights in host memory with those on the device."""
        await_weights(self.chunks)
        for parameter, host in zip(parameters(self.chunks), self._host, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(host, non_blocking=True)
            host.copy_(before, non_blocking=True)
        if before.is_cuda:
            torch.cuda.current_stream().synchronize()  # wait for the asynchronous copies to host memory

    @contextmanager
    def on_device(self) -> Iterator[Chunks]:
        """Swap in the weights from host memory, yield the model, and swap the weights back when the block ends."""
        self.exchange()
        try:
            yield self.chunks
        finally:
            self.exchange()


class OffloadedReference:
    """A reference in host memory. Its weights replace the policy's while the pairs of many steps are scored in advance.

    weights    the reference's weights
    upcoming   returns this rank's micro-batches of the next optimizer steps, one item per step, in order
    """

    passes = 1

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
        """Return the log-probabilities that were scored in advance.

        If ``batches`` have not been scored yet, swap the weights, and score ``batches`` and all upcoming batches.

        *Collectives*: if ``batches`` must be scored, those of :func:`score` and ``await_weights``. If ranks with
        different pairs share experts, also all-reduces over world, each the MIN of one number. One all-reduce finds
        whether ``batches`` must be scored. If so, one more follows for ``batches`` and one per item of ``upcoming``.
        """
        wanted = _name(batches)
        if not self._is_ready(wanted):
            with self.weights.on_device() as chunks:
                self._score(chunks, batches)
                for coming in self.upcoming():
                    self._score(chunks, coming)
        return self._ready.pop(wanted)

    def site_logps(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Swap the weights and score each site."""
        with self.weights.on_device() as chunks:
            return score_sites(chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    def _score(self, chunks: Chunks, batches: Sequence[Batch]) -> None:
        name = _name(batches)
        if not self._is_ready(name):
            self._ready[name] = score(chunks, batches, vocab_size=self.vocab_size, groups=self.groups)

    def _is_ready(self, name: bytes) -> bool:
        """Whether this rank has scored the batches with this ``name``; if ranks share experts, whether all ranks have.

        Ranks that share experts must run every forward pass together. If a rank's batches for two steps contain only
        dummies, they have the same name, although the batches of other ranks differ. This rank would then skip a
        forward pass that other ranks run. Therefore all ranks decide together.
        """
        ready = name in self._ready
        if not self.groups.share_experts:
            return ready
        device = parameters(self.weights.chunks)[0].device
        everywhere = torch.tensor(float(ready), device=device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=self.groups.world)
        return bool(everywhere)


def _name(batches: Sequence[Batch]) -> bytes:
    """Return a key for micro-batches. Keys are equal if the micro-batches contain the same pairs in the same order."""
    return b"|".join(batch.digest.numpy().tobytes() for batch in batches)


class StoredReference:
    """Log-probabilities of each pair, read from a store. No reference model is needed.

    rows   the stored rows of every pair that will be requested
    """

    passes = 0

    def __init__(self, rows: Rows, *, groups: ParallelGroups):
        self.rows = rows
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """Return the stored values. Raises ``KeyError`` if a pair has no stored values."""
        return [self._of(batch) for batch in batches] if self.groups.last_stage else []

    def site_logps(self, batches: Sequence[Batch]) -> None:
        """Return ``None``: the store contains only sums over responses."""

    def _of(self, batch: Batch) -> PairLogps:
        digests = batch.digest.numpy()
        found, present = self.rows.find(keys(digests)), digests.any(axis=1)
        if (found[present] < 0).any():
            raise KeyError(f"pairs without stored log-probabilities in a batch: {int((found[present] < 0).sum())}")
        values = np.zeros((len(found), len(VALUES)), dtype=np.float32)
        values[present] = self.rows.values[found[present]]
        (there,) = to_device([torch.from_numpy(values)], batch.weights.device)
        chosen, rejected, *shared = there.unbind(1)
        return PairLogps(chosen, rejected, batch.chosen_tokens, batch.rejected_tokens, *shared)


class DatasetReference:
    """Log-probabilities that the data records contain."""

    passes = 0

    def __init__(self, *, groups: ParallelGroups):
        self.groups = groups
        self.age = 0

    def logps(self, batches: Sequence[Batch]) -> list[PairLogps]:
        """Return the reference columns of the batches. They contain only sums over whole responses."""
        if not self.groups.last_stage:
            return []
        return [
            PairLogps(batch.ref_chosen_logps, batch.ref_rejected_logps, batch.chosen_tokens, batch.rejected_tokens)
            for batch in batches
        ]

    def site_logps(self, batches: Sequence[Batch]) -> None:
        """Return ``None``: the records contain only sums over responses."""


class NoReference:
    """A placeholder for losses that do not use a reference."""

    age = 0
    passes = 0

    def logps(self, batches: Sequence[Batch]) -> None:
        """Return ``None``."""

    def site_logps(self, batches: Sequence[Batch]) -> None:
        """Return ``None``."""


def parameters(chunks: Chunks) -> list[Tensor]:
    """Return the parameters of this rank's chunks, in the same order for the policy and the reference."""
    return [parameter for chunk in chunks for parameter in chunk.parameters()]
