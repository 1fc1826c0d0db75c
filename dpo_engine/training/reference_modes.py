"""What each ``reference.mode`` builds, and filling a store with what is missing from it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from dpo_engine.config import Config
from dpo_engine.data.batches import Batch
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.formats import REFERENCE_LOGPS
from dpo_engine.errors import ConfigError, DataError, Interrupted, NumbersError
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.parallel import together
from dpo_engine.scoring.reference import (
    Chunks,
    DatasetReference,
    HostWeights,
    NoReference,
    OffloadedReference,
    Reference,
    ResidentReference,
    StoredReference,
    score,
)
from dpo_engine.scoring.store import VALUES, Numerics, ReferenceStore, Rows, find, keys
from dpo_engine.training.engine import Engine
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.optimizer import Trained
from dpo_engine.training.run_data import open_data

PAIRS_PER_SEGMENT = 1024
"""Pairs that are scored before they are written: what an interruption can lose."""

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference, relative to ``max(1, |value|)``, between what is stored and what is scored again: layouts and
machines differ in the order of additions."""

Say = Callable[[str], None]


def open_reference(
    engine: Engine,
    trained: Trained,
    *,
    pairs: Sequence[PairDataset] = (),
    upcoming: Callable[[], Iterable[Sequence[Batch]]] = tuple,
    say: Say = lambda line: None,
    between: Callable[[], None] = lambda: None,
) -> Reference:
    """What ``reference.mode`` asks for, if the loss reads a reference.

    trained    the policy at step 0, holding the weights of ``model.path``; they are there again when this returns
    pairs      all pairs whose log-probabilities will be asked for: training and held-out ones
    upcoming   micro-batches of the coming steps, for a reference that scores ahead
    between    called on all ranks while a store is filled, which may take long; may raise to stop

    *Collectives*: those of loading and scoring; all ranks leave together when one cannot go on.
    Raises :class:`~dpo_engine.errors.DataError` for log-probabilities that are missing, or not those of the reference.
    """
    asked = engine.config.reference
    if asked.mode == "none" or not engine.objective.facts.needs_reference:
        return NoReference()
    if asked.mode == "resident":
        chunks = engine.load_model(engine.config.reference_path, key=engine.reference_key)
        return ResidentReference(chunks, vocab_size=engine.arch.vocab_size, groups=engine.groups)
    if asked.mode == "offloaded":
        weights = HostWeights(trained.chunks, pinned=engine.platform.gpu)
        if not engine.same_weights:
            engine.load_weights(trained.chunks, engine.config.reference_path, key=engine.reference_key)
            weights.exchange()
        return OffloadedReference(weights, upcoming, vocab_size=engine.arch.vocab_size, groups=engine.groups)
    if asked.mode == "dataset":
        if asked.verify:
            with _reference_weights(engine, trained) as chunks:
                checked = _verify(engine, chunks, [_given(part) for part in pairs], "the records")
            say(f"reference: the records' own log-probabilities, {checked} pairs checked")
        return DatasetReference(groups=engine.groups)
    return StoredReference(_from_store(engine, trained, pairs, say, between), groups=engine.groups)


@contextmanager
def _reference_weights(engine: Engine, trained: Trained) -> Iterator[Chunks]:
    """The policy's model with the reference's weights, then with its own again."""
    if engine.same_weights:
        yield trained.chunks
        return
    own = HostWeights(trained.chunks, pinned=engine.platform.gpu)
    try:
        engine.load_weights(trained.chunks, engine.config.reference_path, key=engine.reference_key)
        yield trained.chunks
    finally:
        own.exchange()


def open_store(engine: Engine) -> ReferenceStore:
    """The store of this run's reference, its folder named by what the weights are.

    *Collectives*: those of :meth:`~dpo_engine.training.engine.Engine.reference_digest`.
    """
    dtype = str(engine.platform.dtype(engine.config.model.dtype)).removeprefix("torch.")
    return ReferenceStore(engine.config.store_path, Numerics(engine.reference_digest, dtype, engine.spec))


def _from_store(
    engine: Engine, trained: Trained, pairs: Sequence[PairDataset], say: Say, between: Callable[[], None]
) -> Rows:
    """Rows of all ``pairs``, after what is missing was scored, or refused, and some of the others checked."""
    store, asked = open_store(engine), engine.config.reference
    wanted = wanted_keys(pairs)
    missing, complaints = look(engine, store, wanted)
    count, checked = int(missing.sum()), 0
    if count and asked.missing == "error":
        raise DataError(
            [
                f"reference.store={engine.config.store_path}: {count} of {len(wanted)} pairs have no stored "
                f"log-probabilities in {store.folder.name}; fill it with `dpo-engine reference`, or set "
                "reference.missing=score",
                *complaints,
            ]
        )
    for line in complaints:
        say(f"reference: {line}")
    if count or asked.verify:
        rows = everywhere(engine, store)
        with _reference_weights(engine, trained) as chunks:
            checked = _verify(engine, chunks, [_stored(part, rows) for part in pairs], str(store.folder))
            fill(engine, chunks, store, pairs, say, between)
    say(
        f"reference: {len(wanted) - count:,} of {len(wanted):,} pairs were in {store.folder}, "
        f"{checked} of them checked; {count:,} scored now"
    )
    return everywhere(engine, store)


def fill_store(config: Config, say: Say) -> None:
    """Score all pairs of a run that its store lacks; what is stored stays, however this ends.

    say   called with the lines of the report on every rank

    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks after a segment, when a signal asked for it.
    """
    if config.reference.mode != "stored":
        raise ConfigError(
            f"reference.mode={config.reference.mode}: keeps no store that could be filled; set reference.mode=stored"
        )
    engine = Engine.open(config)
    try:
        data = open_data(config, engine.groups, say)
        store = open_store(engine)
        missing, complaints = look(engine, store, wanted_keys(data.all_pairs))
        for line in [*engine.describe(), *complaints]:
            say(line)
        say(f"reference: {len(missing) - int(missing.sum()):,} of {len(missing):,} pairs are in {store.folder}")
        if not missing.any():
            return
        chunks = engine.load_model(config.reference_path, key=engine.reference_key)
        with Interruption(engine.groups.world, engine.platform.device) as interruption:
            fill(engine, chunks, store, data.all_pairs, say, partial(leave_if_asked, interruption))
    finally:
        engine.close()


def leave_if_asked(interruption: Interruption) -> None:
    """What is done between the segments of a store.

    *Collectives*: one MAX of a number over all ranks.
    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks when a signal asked for it.
    """
    if signal := interruption.agreed():
        raise Interrupted(f"{signal}: what is scored is stored; the same command scores the rest")


def wanted_keys(pairs: Sequence[PairDataset]) -> np.ndarray:
    """Keys of all pairs, each once [n]."""
    return np.unique(np.concatenate([keys(part.digests) for part in pairs]))


def look(engine: Engine, store: ReferenceStore, wanted: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which of ``wanted`` [n] are missing from the store, and what is wrong with it, the same on every rank.

    Other writers may add segments at any time, so the first rank looks for all.

    *Collectives*: one broadcast of objects from the first rank.
    """

    def read() -> tuple[np.ndarray, list[str]]:
        missing = store.read(wanted).find(wanted) < 0
        return np.packbits(missing), store.complaints()

    packed, complaints = _from_first(engine, read)
    return np.unpackbits(packed, count=len(wanted)).astype(bool), complaints


def everywhere(engine: Engine, store: ReferenceStore) -> Rows:
    """The rows that the first rank has read, on every rank.

    *Collectives*: one broadcast of objects from the first rank.
    """
    return _from_first(engine, lambda: store.rows)


def _from_first(engine: Engine, work: Callable[[], Any]) -> Any:
    """What ``work`` returns on the first rank, on every rank."""
    world, found = engine.groups.world, [None]
    found[0] = together(world, work if world.rank() == 0 else lambda: None)
    dist.broadcast_object_list(found, src=0, group=world)
    return found[0]


def fill(
    engine: Engine,
    chunks: Chunks,
    store: ReferenceStore,
    pairs: Sequence[PairDataset],
    say: Say,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Score what the store lacks of ``pairs`` and add it, segment by segment.

    chunks    a model that holds the reference's weights
    between   called on all ranks after every segment; may raise to stop

    Each job starts at a place of its own and looks again before every segment, so that several share the work.

    *Collectives*: those of scoring; per segment one broadcast and one gather of objects over all ranks.
    Raises :class:`~dpo_engine.errors.DataError` on every rank when what was written is not there to be read.
    """
    wanted = wanted_keys(pairs)
    parts = [(part, *np.unique(keys(part.digests), return_index=True)) for part in pairs]
    start = _from_first(engine, lambda: np.random.default_rng().random())
    missing, _ = look(engine, store, wanted)
    while (lacking := np.flatnonzero(missing)).size:
        todo = np.roll(lacking, -int(np.searchsorted(lacking, start * len(wanted))))[:PAIRS_PER_SEGMENT]
        left = np.sort(wanted[todo])
        for part, unique, first in parts:
            here = find(unique, left)
            mine = np.sort(first[here[here >= 0]])
            left = left[here < 0]  # a pair of several data sets is scored once
            if len(mine):
                together(engine.groups.world, partial(_add, engine, store, *score_pairs(engine, chunks, part, mine)))
        missing, complaints = look(engine, store, wanted)
        if missing[todo].any():
            raise DataError(
                [f"{store.folder}: what was written cannot be read back; give another reference.store", *complaints]
            )
        say(f"reference: {len(wanted) - int(missing.sum()):,} of {len(wanted):,} pairs are stored")
        between()


def _add(engine: Engine, store: ReferenceStore, digests: np.ndarray, values: np.ndarray) -> None:
    """Check and write rows, on the first rank."""
    if engine.groups.world.rank() == 0:
        if not np.isfinite(values).all():
            worst = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            raise NumbersError(
                f"reference: pair {digests[worst].tobytes().hex()} has log-probabilities {values[worst].tolist()}; the "
                "weights, or their dtype, are not fit to score it"
            )
        store.append(digests, values)


def score_pairs(
    engine: Engine, chunks: Chunks, pairs: PairDataset, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the pairs ``indices`` under ``chunks``, on every rank.

    Returns  digests [n, 2] int64 and values [n, len(VALUES)] fp32, in no particular order

    *Collectives*: those of scoring; one gather of objects over all ranks.
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
    """Digests and values of a micro-batch's pairs, dummies left out."""
    there = (batch.index >= 0).cpu()
    values = torch.stack([getattr(logps, name) for name in VALUES], dim=1)
    return batch.digest.cpu()[there].numpy(), values.float().cpu()[there].numpy()


class _Known(NamedTuple):
    """What is said about some pairs of a data set.

    indices  [n]     their numbers in it
    values   [n, 2]  whole sums of chosen and rejected, nats
    """

    pairs: PairDataset
    indices: np.ndarray
    values: np.ndarray


def _stored(pairs: PairDataset, rows: Rows) -> _Known:
    found = rows.find(keys(pairs.digests))
    indices = np.flatnonzero(found >= 0)
    return _Known(pairs, indices, rows.values[found[indices], :2])


def _given(pairs: PairDataset) -> _Known:
    columns = [pairs.numbers(name) for name in REFERENCE_LOGPS]
    return _Known(pairs, np.arange(len(pairs)), np.stack(columns, axis=1))


def _verify(engine: Engine, chunks: Chunks, known: Sequence[_Known], where: str) -> int:
    """Score ``reference.verify`` of the known pairs again and compare; returns how many.

    *Collectives*: those of scoring.
    Raises :class:`~dpo_engine.errors.DataError` on every rank with the first pair that disagrees.
    """
    total = sum(len(indices) for _, indices, _ in known)
    count = min(engine.config.reference.verify, total)
    spread = np.linspace(0, total - 1, count, dtype=int)  # spread over all files, the held-out ones too
    start = 0
    for pairs, indices, values in known:
        places = spread[(spread >= start) & (spread < start + len(indices))] - start
        start += len(indices)
        if len(places):
            digests, scored = score_pairs(engine, chunks, pairs, indices[places])
            again = Rows.empty().with_more(keys(digests), scored)
            for place in places:
                row = again.find(keys(pairs.digests[indices[place]]))[0]
                _compare(engine, pairs, int(indices[place]), values[place], again.values[row, :2], where)
    return count


def _compare(engine: Engine, pairs: PairDataset, index: int, said: np.ndarray, found: np.ndarray, where: str) -> None:
    tolerance = AGREEMENT[engine.platform.dtype(engine.config.model.dtype)]
    if (np.abs(said - found) <= tolerance * np.maximum(1, np.abs(found))).all():
        return
    pair = pairs[index]
    raise DataError(
        f"{where}: log-probabilities of pair {pair.digest} of {pairs.sources[pair.source]} are {said[0]:.4f} and "
        f"{said[1]:.4f} there, and {engine.config.reference_path} gives {found[0]:.4f} and {found[1]:.4f}; likely "
        "causes: other weights, another chat template or truncation, a stale store. Remove them, or set "
        "reference.verify=0 to trust them"
    )
