"""The sizes of a run's parallel dimensions, and functions that check these sizes. Process groups are not needed."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dpo_engine.errors import ConfigError


def divisors(number: int) -> list[int]:
    """Return the positive divisors of ``number`` in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(values: list[int]) -> str:
    """Format ``[1, 2, 4]`` as ``"1, 2 or 4"``."""
    head, last = values[:-1], values[-1]
    return f"{', '.join(map(str, head))} or {last}" if head else str(last)


def default_etp(tp: int, ep: int) -> int:
    """Return the default of ``parallel.etp``: tp if experts are not distributed over ranks (ep is 1), otherwise 1."""
    return tp if ep == 1 else 1


@dataclass(frozen=True)
class ParallelDims:
    """The sizes of a run's parallel dimensions. This class only computes; it initializes nothing.

    tp   number of tensor-parallel ranks         pp     number of pipeline stages
    vpp  model chunks per stage; None means 1    cp     number of context-parallel ranks
    ep   number of expert-parallel ranks         world  total number of ranks
    etp  number of ranks over which each expert's matrices are split; None means tp if ep is 1, otherwise 1
    layers  number of layers in each of the pp x vpp model chunks, in the order of the model; None: equal numbers

    The ranks of a stage form two grids: tp x cp x dp and, for experts, etp x ep x expert_dp.

    Raises :class:`ConfigError` unless ``world`` is a multiple of ``tp x pp x cp`` and of ``etp x ep x pp``.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    world: int = 1
    etp: int | None = None
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, parallel: Any, world: int) -> "ParallelDims":
        """Return the sizes in the section ``parallel`` of a configuration, for ``world`` ranks, without ``layers``."""
        return cls(parallel.tp, parallel.pp, parallel.vpp, parallel.cp, parallel.ep, world, parallel.etp)

    @classmethod
    def fewest(cls, parallel: Any) -> int:
        """Return the smallest number of ranks for the section ``parallel``. Every valid number is a multiple of it."""
        etp = parallel.etp or default_etp(parallel.tp, parallel.ep)
        return parallel.pp * math.lcm(parallel.tp * parallel.cp, etp * parallel.ep)

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", default_etp(self.tp, self.ep))
        if self.world % self.model_size:
            raise ConfigError(
                f"parallel: tp={self.tp} x pp={self.pp} x cp={self.cp} = {self.model_size} must divide the number of "
                f"ranks, {self.world}; start {self.fewest(self)} ranks or a multiple of this number "
                f"(torchrun --nproc-per-node {self.fewest(self)} -m dpo_engine ...)"
            )
        if self.world // self.pp % (self.etp * self.ep):
            raise ConfigError(
                f"parallel: etp={self.etp} x ep={self.ep} = {self.etp * self.ep} must divide the number of ranks of a "
                f"pipeline stage, {self.world // self.pp}; start {self.fewest(self)} ranks or a multiple of this number"
            )

    @property
    def model_size(self) -> int:
        """Number of ranks that share one copy of the model and work on the same micro-batch."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Data-parallel size: the number of model copies, which work on different pairs."""
        return self.world // self.model_size

    @property
    def expert_dp(self) -> int:
        """Number of copies of each expert, over which its gradients are summed."""
        return self.world // (self.pp * self.etp * self.ep)

    @property
    def chunks(self) -> int:
        """Number of model chunks on each pipeline rank; 1 without interleaving."""
        return self.vpp or 1

    @property
    def division(self) -> str:
        """The numbers of layers in the model chunks as text; empty if ``layers`` is None."""
        return " + ".join(map(str, self.layers or ()))

    def describe(self, *, experts: bool) -> str:
        """Return the sizes as text; ``experts`` says whether the model has experts."""
        text = f"tp {self.tp}, pp {self.pp}, vpp {self.chunks}, cp {self.cp}, dp {self.dp}"
        if experts:
            text += f", ep {self.ep}, etp {self.etp}, copies of each expert {self.expert_dp}"
        text += f" on {self.world} rank{'s' * (self.world > 1)}"
        return text + (f", layers {self.division}" if self.layers else "")

    def chunk_layers(self, num_layers: int) -> list[range]:
        """Return the layers of each model chunk, in the order of the model; chunk ``i`` belongs to stage ``i % pp``."""
        count = self.pp * self.chunks
        sizes = self.layers or (num_layers // count,) * count
        ends = list(accumulate(sizes))
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def layers_of(self, stage: int, num_layers: int) -> list[int]:
        """Return the indices of a stage's layers, over all its model chunks."""
        return [layer for chunk in self.chunk_layers(num_layers)[stage :: self.pp] for layer in chunk]

    def problems(self, arch: Any) -> list[str]:
        """Return the reasons why these sizes cannot split a model of ``arch``; an empty list if they can.

        arch  an :class:`~dpo_engine.model.Architecture`
        """
        found = []

        def must_divide(key: str, value: int, what: str, number: int) -> None:
            if number % value:
                found.append(
                    f"parallel.{key}={value}: must divide model.{what}={number}; use {choices(divisors(number))}"
                )

        must_divide("tp", self.tp, "num_attention_heads", arch.num_attention_heads)
        if not arch.experts or arch.layers("dense"):
            must_divide("tp", self.tp, "ffn_hidden_size", arch.ffn_hidden_size)
        must_divide("tp", self.tp, "hidden_size", arch.hidden_size)
        if arch.num_kv_heads % self.tp and self.tp % arch.num_kv_heads:
            found.append(
                f"parallel.tp={self.tp}: must divide model.num_kv_heads={arch.num_kv_heads} or be a multiple of it; "
                f"use {choices(divisors(arch.num_kv_heads))}"
            )
        elif arch.whole_qk_norm and self.tp > arch.num_kv_heads:
            found.append(
                f"parallel.tp={self.tp}: must divide model.num_kv_heads={arch.num_kv_heads}, because the norm of keys "
                f"covers all key heads; use {choices(divisors(arch.num_kv_heads))}"
            )
        found += self._layer_problems(arch.num_layers)
        if self.vpp is not None and self.pp == 1:
            found.append(f"parallel.vpp={self.vpp}: requires parallel.pp >= 2, but it is 1; remove parallel.vpp")
        if arch.experts:
            must_divide("ep", self.ep, "experts.count", arch.experts.count)
            must_divide("etp", self.etp, "experts.ffn_hidden_size", arch.experts.ffn_hidden_size)
            if arch.experts.biases:
                must_divide("etp", self.etp, "hidden_size", arch.hidden_size)
            if arch.experts.shared:
                must_divide("tp", self.tp, "experts.shared_size", arch.experts.shared_size)
        elif self.ep > 1:
            found.append(f"parallel.ep={self.ep}: model type {arch.model_type} has no experts; use 1")
        elif self.etp != self.tp:
            found.append(f"parallel.etp={self.etp}: model type {arch.model_type} has no experts; remove parallel.etp")
        return found

    def _layer_problems(self, num_layers: int) -> list[str]:
        count = self.pp * self.chunks
        key = f"parallel.pp={self.pp}" + (f" x parallel.vpp={self.vpp}" if self.vpp else "")
        if count > num_layers:
            return [f"{key}: must be at most model.num_layers={num_layers}; use fewer model chunks"]
        if self.layers is None and num_layers % count:
            return [
                f"{key}: must divide model.num_layers={num_layers}; use {choices(divisors(num_layers))}, or set "
                "parallel.layers=auto"
            ]
        if self.layers is not None and len(self.layers) == count and sum(self.layers) != num_layers:
            return [
                f"parallel.layers={list(self.layers)}: must sum to model.num_layers={num_layers}, but the sum is "
                f"{sum(self.layers)}; correct the list"
            ]
        return []

    def share_multiple(self, sequence_parallel: bool, tokens: int = 1) -> int:
        """Return the number that must divide the number of tokens in a context-parallel rank's share of a row.

        Sequence parallelism splits a share into ``tp`` equal parts.

        tokens   number that must divide the number of tokens in each part. Without sequence parallelism, the share has
                 only one part
        """
        return tokens * (self.tp if sequence_parallel else 1)

    def sequence_multiple(self, sequence_parallel: bool, tokens: int = 1) -> int:
        """Return the number that must divide the number of tokens in every padded row (``batch.layout=stacked``).

        Context parallelism splits a row into ``2 cp`` equal chunks, two for each rank.

        tokens   as for :meth:`share_multiple`
        """
        halves = tokens if self.cp == 1 else math.lcm(2, tokens)
        return self.cp * self.share_multiple(sequence_parallel, halves)

    def padded_vocab(self, vocab_size: int) -> int:
        """Return ``vocab_size`` rounded up so that each tensor-parallel rank has a multiple of 8 rows."""
        tile = 8 * self.tp
        return -(-vocab_size // tile) * tile
