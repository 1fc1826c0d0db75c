"""Build the reference that ``reference.mode`` selects, and verify log-probabilities that were scored earlier."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from dpo_engine.batching.batches import Batch
from dpo_engine.config.sections import ReferenceConfig
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.pair import REFERENCE_LOGPS
from dpo_engine.errors import DataError
from dpo_engine.model.adapters import AdapterValues, adapters_off
from dpo_engine.scoring.reference import (
    Chunks,
    DatasetReference,
    HostWeights,
    NoReference,
    OffloadedReference,
    Reference,
    ResidentReference,
    SharedReference,
    StoredReference,
)
from dpo_engine.scoring.store import Rows, keys
from dpo_engine.training.engine import Engine
from dpo_engine.training.fill_store import Say, everywhere, fill, look, open_store, score_pairs, wanted_keys

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Tolerance for the difference between a known log-probability and the value found by scoring the pair again.

The tolerance is relative to ``max(1, |value found|)``. The two values can differ because the order of additions depends
on the layout and the machine."""


def open_reference(
    engine: Engine,
    policy: Chunks,
    *,
    pairs: Sequence[PairDataset] = (),
    upcoming: Callable[[], Iterable[Sequence[Batch]]] = tuple,
    say: Say = lambda line: None,
    between: Callable[[], None] = lambda: None,
) -> Reference:
    """Build the reference that ``reference.mode`` selects, or `NoReference` if the loss does not read a reference.

    policy     this rank's chunks, with the run's initial weights; these weights can be replaced temporarily, and are
               restored before this function returns
    pairs      all pairs that the run will score: training and held-out pairs
    upcoming   returns the micro-batches of the next steps, for a reference that scores several steps ahead
    say        called with each line for the log
    between    called on all ranks after every segment that is written to a store. Filling a store can take a long
               time, so ``between`` can stop the work by raising an exception

    *Collectives*: those of loading and scoring. If one rank fails, all ranks raise its error.
    Raises :class:`~dpo_engine.errors.DataError` for log-probabilities that are missing or do not match the reference,
    and :class:`~dpo_engine.errors.NumbersError` for log-probabilities that are not finite.
    """
    asked, mode = engine.config.reference, engine.config.reference_mode
    model: dict[str, Any] = {"vocab_size": engine.arch.vocab_size, "groups": engine.groups}
    if mode == "none" or not engine.objective.facts.needs_reference:
        return NoReference()
    if mode == "resident":
        return ResidentReference(engine.load_reference(), **model)
    if mode == "shared":
        own = asked.sync_every or engine.config.reference_has_adapter
        return SharedReference(policy, [AdapterValues(chunk) for chunk in policy] if own else None, **model)
    if mode == "offloaded":
        weights = HostWeights(policy, pinned=engine.platform.gpu)
        if not engine.same_weights:
            engine.load_weights(policy, engine.config.reference_path, key=engine.reference_key)
            weights.exchange()
        return OffloadedReference(weights, upcoming, **model)
    if mode == "dataset":
        if asked.verify:
            with _reference_weights(engine, policy) as chunks:
                checked = _verify(engine, chunks, [_given(part) for part in pairs], "data records")
            say(f"reference: log-probabilities from the data records; pairs verified: {checked}")
        return DatasetReference(groups=engine.groups)
    return StoredReference(_from_store(engine, policy, pairs, say, between), groups=engine.groups)


def following(reference: Reference, asked: ReferenceConfig) -> Sequence[torch.nn.Module | AdapterValues]:
    """Return the weights of a reference that is periodically updated from the policy (``reference.sync_every``).

    Checkpoints must include these weights. For a reference that is never updated, return an empty tuple.
    """
    if not asked.sync_every:
        return ()
    if isinstance(reference, SharedReference):
        return reference.start
    return reference.chunks if isinstance(reference, ResidentReference) else ()


def reference_identity(engine: Engine) -> dict[str, Any] | None:
    """Return everything that determines the reference's log-probabilities, or None without a reference.

    *Collectives*, at the first use: those of :attr:`~dpo_engine.training.engine.Engine.reference_digest`.
    """
    asked, mode = engine.config.reference, engine.config.reference_mode
    if mode == "none" or not engine.objective.facts.needs_reference:
        return None
    if mode == "dataset":
        return {"weights": "the records' own"}
    follows = {"sync_every": asked.sync_every, "sync_alpha": asked.sync_alpha} if asked.sync_every else {}
    return {"weights": engine.reference_digest, **follows}


@contextmanager
def _reference_weights(engine: Engine, policy: Chunks) -> Iterator[Chunks]:
    """Yield the policy's model with the reference's weights in it, and restore the policy's weights on exit."""
    if engine.config.reference_has_adapter or engine.same_weights:
        yield policy
        return
    with adapters_off(policy):
        if engine.config.reference.path is None:
            yield policy
            return
        own = HostWeights(policy, pinned=engine.platform.gpu)
        try:
            engine.load_weights(policy, engine.config.reference_path, key=engine.reference_key)
            yield policy
        finally:
            own.exchange()


def _from_store(
    engine: Engine, policy: Chunks, pairs: Sequence[PairDataset], say: Say, between: Callable[[], None]
) -> Rows:
    """Return the store's rows for all ``pairs``.

    Missing pairs are scored or cause an error, according to ``reference.missing``. At most ``reference.verify`` of the
    stored rows are verified.
    """
    store, asked = open_store(engine), engine.config.reference
    wanted = wanted_keys(pairs)
    missing, complaints = look(engine, store, wanted)
    count, checked = int(missing.sum()), 0
    if count and asked.missing == "error":
        raise DataError(
            [
                f"reference.store={engine.config.store_path}: {count} of {len(wanted)} pairs have no stored "
                f"log-probabilities in {store.folder.name}; fill the store with `dpo-engine reference`, or set "
                "reference.missing=score",
                *complaints,
            ]
        )
    for line in complaints:
        say(f"reference: {line}")
    if count or asked.verify:
        rows = everywhere(engine, store)
        with _reference_weights(engine, policy) as chunks:
            checked = _verify(engine, chunks, [_stored(part, rows) for part in pairs], str(store.folder))
            fill(engine, chunks, store, pairs, say, between)
    say(
        f"reference: {len(wanted) - count:,} of {len(wanted):,} pairs found in {store.folder}, "
        f"{checked} of them verified; {count:,} scored now"
    )
    return everywhere(engine, store)


class _Known(NamedTuple):
    """Log-probabilities that are known for some pairs of a data set.

    indices  [n]     indices of these pairs in the data set
    values   [n, 2]  log-probabilities of the chosen and the rejected response, each summed over its tokens, in nats
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
    """Score some of the known pairs again, at most ``reference.verify``, and compare the results with the known values.

    where   the source of the known values, for error messages

    Returns  the number of pairs verified

    *Collectives*: those of scoring.
    Raises :class:`~dpo_engine.errors.DataError` on every rank about the first pair whose values differ.
    """
    total = sum(len(indices) for _, indices, _ in known)
    count = min(engine.config.reference.verify, total)
    spread = np.linspace(0, total - 1, count, dtype=int)  # evenly over all data sets, including held-out pairs
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
    # Use the configured dtype even with --fp64, because the known values were computed in the configured dtype.
    tolerance = AGREEMENT[engine.platform.dtype(engine.config.model.dtype)]
    if (np.abs(said - found) <= tolerance * np.maximum(1, np.abs(found))).all():
        return
    pair = pairs[index]
    raise DataError(
        f"{where}: log-probabilities of pair {pair.digest} from {pairs.sources[pair.source]} are {said[0]:.4f} and "
        f"{said[1]:.4f}, but {engine.config.reference_path} gives {found[0]:.4f} and {found[1]:.4f}; likely "
        "causes: other weights, another chat template or truncation, a stale store; remove these log-probabilities, "
        "or set reference.verify=0 to use them without verification"
    )
