"""Fill the reference store: score pairs with the reference, in any layout. Several jobs can fill one store at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpo_engine.batching.batches import Batch
from dpo_engine.data.dataset import PairDataset
from dpo_engine.errors import DataError, Interrupted, NumbersError
from dpo_engine.exit_code import note_progress
from dpo_engine.model.fp8 import spec_name
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.long_work import Meter, from_first, without_time_limit
from dpo_engine.platform.progress_line import counting
from dpo_engine.scoring.reference import Chunks, score
from dpo_engine.scoring.store import VALUES, Numerics, ReferenceStore, Rows, find, keys
from dpo_engine.training.engine import Engine
from dpo_engine.training.interruption import Interruption

PAIRS_PER_SEGMENT = 1024
"""Maximum number of pairs scored between two writes to the store. A killed job loses at most this many results."""

Say = Callable[[str], None]


def open_store(engine: Engine) -> ReferenceStore:
    """Open the store for this run's reference.

    The name of the reference's folder has three parts: a digest of the weights, then the dtype, then the layer spec.

    *Collectives*: those of :meth:`~dpo_engine.training.engine.Engine.reference_digest`.
    """
    dtype, spec = engine.dtype_name, spec_name(engine.config, engine.spec)
    return ReferenceStore(engine.config.store_path, Numerics(engine.reference_digest, dtype, spec))


def fill(
    engine: Engine,
    chunks: Chunks,
    store: ReferenceStore,
    pairs: Sequence[PairDataset],
    say: Say,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Score the pairs that are missing from the store, and write the results in rounds.

    A round scores at most :data:`PAIRS_PER_SEGMENT` pairs. It writes one segment for each data set that has pairs to
    score in this round.

    chunks    a model that holds the reference's weights
    pairs     the data sets whose pairs the store must contain
    say       called with one log line after every round
    between   called on all ranks after every round; it can stop the work by raising an exception

    Each job starts at a random position and rereads the store before every round, so several jobs share the work.

    *Collectives*: those of scoring, and for each round, broadcasts and all-gathers of objects over all ranks. Reading
    and writing the store have no time limit.
    Raises :class:`~dpo_engine.errors.DataError` on every rank if the store cannot be read or written, or if values that
    were just written are missing from it. Raises :class:`~dpo_engine.errors.NumbersError` on every rank if a
    log-probability is not finite.
    """
    wanted = wanted_keys(pairs)
    parts = [(part, *np.unique(keys(part.digests), return_index=True)) for part in pairs]
    world = engine.groups.world
    start = from_first(world, lambda: np.random.default_rng().random())
    missing, _ = look(engine, store, wanted)
    unscored = int(missing.sum())
    share = -(-unscored // engine.groups.dp.size())
    with counting("scoring the reference", unscored, parts=share, shown=world.rank() == 0) as count:
        while (lacking := np.flatnonzero(missing)).size:
            turn = np.roll(lacking, -int(np.searchsorted(lacking, start * len(wanted))))[:PAIRS_PER_SEGMENT]
            left = np.sort(wanted[turn])
            for part, unique, first in parts:
                here = find(unique, left)
                mine = np.sort(first[here[here >= 0]])
                left = left[here < 0]  # a pair that is in several data sets is scored only once
                if len(mine):
                    scored = score_pairs(engine, chunks, part, mine)
                    count.line.clear()
                    write = partial(_add, engine, store, *scored)
                    without_time_limit(world, write, Meter("writing the reference store"))
            missing, complaints = look(engine, store, wanted)
            if missing[turn].any():
                raise DataError(
                    [
                        f"{store.folder}: values that were just written cannot be read; set another reference.store",
                        *complaints,
                    ]
                )
            note_progress()
            say(f"reference: {len(wanted) - int(missing.sum()):,} of {len(wanted):,} pairs stored")
            between()


def leave_if_asked(engine: Engine, interruption: Interruption) -> None:
    """Stop if any rank received a signal. Call this before the first round of :func:`fill` and between rounds.

    *Collectives*: one MAX of a number over all ranks.
    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks if any of them received a signal.
    """
    if signal := interruption.agreed(engine.groups.world, engine.platform.device):
        raise Interrupted(f"{signal}: stopped; all scored pairs are stored; run the same command to score the rest")


def wanted_keys(pairs: Sequence[PairDataset]) -> np.ndarray:
    """Return the distinct keys of all pairs, [n]."""
    return np.unique(np.concatenate([keys(part.digests) for part in pairs]))


def look(engine: Engine, store: ReferenceStore, wanted: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Find which keys are missing from the store.

    Other jobs can add segments at any time, so rank 0 reads the store for all ranks.

    wanted   sorted keys to look for [n]; must be the same in every call

    Returns  on every rank, whether each key is missing [n] bool, and a line for each problem found in the store

    *Collectives*: those of :func:`~dpo_engine.platform.long_work.from_first`.
    """

    def read() -> tuple[np.ndarray, list[str]]:
        missing = store.read(wanted).find(wanted) < 0
        return np.packbits(missing), store.complaints()

    packed, complaints = from_first(engine.groups.world, read, Meter("reading the reference store"))
    return np.unpackbits(packed, count=len(wanted)).astype(bool), complaints


def everywhere(engine: Engine, store: ReferenceStore) -> Rows:
    """Return on every rank the rows that rank 0 has read from the store.

    *Collectives*: those of :func:`~dpo_engine.platform.long_work.from_first`.
    """
    return from_first(engine.groups.world, lambda: store.rows, Meter("reading the reference store"))


def _add(engine: Engine, store: ReferenceStore, digests: np.ndarray, values: np.ndarray) -> None:
    """On rank 0, check that the values are finite and write them to the store."""
    if engine.groups.world.rank() == 0:
        if not np.isfinite(values).all():
            worst = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            raise NumbersError(
                f"reference: pair {digests[worst].tobytes().hex()} has log-probabilities {values[worst].tolist()}, but "
                "they must be finite; check the reference's weights, or set another model.dtype"
            )
        store.append(digests, values)


def score_pairs(
    engine: Engine, chunks: Chunks, pairs: PairDataset, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Score the pairs ``indices`` with the model ``chunks``.

    Returns  on every rank, digests [n, 2] int64 and values [n, len(VALUES)] fp32, in no particular order

    *Collectives*: those of scoring; one all-gather of objects over all ranks.
    """
    batches = engine.batches(pairs, indices)
    scored = score(chunks, batches, vocab_size=engine.arch.vocab_size, groups=engine.groups)
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    if engine.groups.last_stage and engine.groups.tp.rank() == 0 and engine.groups.cp.rank() == 0:
        mine = [_present(batch, logps) for batch, logps in zip(batches, scored, strict=True)]
    everyone: list[Any] = [None] * engine.groups.world.size()
    dist.all_gather_object(everyone, mine, group=engine.groups.world)
    parts = [part for rank in everyone for part in rank]
    return np.concatenate([digests for digests, _ in parts]), np.concatenate([values for _, values in parts])


def _present(batch: Batch, logps: PairLogps) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests and values of a micro-batch's pairs, without the dummy pairs that fill it up."""
    there = batch.digest.any(dim=1)
    values = torch.stack([getattr(logps, name) for name in VALUES], dim=1)
    return batch.digest[there].numpy(), values.float().cpu()[there].numpy()
