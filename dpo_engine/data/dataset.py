"""Tokenized pairs in an Arrow IPC file, which is written once, batch by batch, and memory-mapped by every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpo_engine.data.conversation import plain
from dpo_engine.data.sources import locate
from dpo_engine.strict_json import parse_object

PARTS = ("prompt", "chosen", "rejected")
MASKS = ("chosen_mask", "rejected_mask")
NUMBERS = ("margin", "chosen_reward", "rejected_reward", "ref_chosen_logps", "ref_rejected_logps")
ROWS = 1024
DIGEST_BYTES = 16
SCHEMA = pa.schema(
    [(part, pa.large_list(pa.int32())) for part in PARTS]
    + [(mask, pa.large_list(pa.uint8())) for mask in MASKS]  # an empty list means that all tokens are scored
    + [("weight", pa.float64()), ("source", pa.int32()), ("digest", pa.binary(DIGEST_BYTES))]
    + [("prompt_key", pa.int64()), ("prompt_text", pa.int64()), ("line", pa.int64())]
    + [(number, pa.float64()) for number in NUMBERS]
)


class TokenPair(NamedTuple):
    """A pair as token ids. A sequence to score is `prompt` followed by one of the responses.

    prompt    [p]  int32, p >= 1
    chosen    [c]  int32, c >= 1, including the end token unless `data.add_eos` is false
    rejected  [r]  int32, r >= 1, including the end token under the same condition
    weight         factor of this pair's loss, > 0
    margin         how much better the chosen response is; nan if not given
    digest         hash of the three id lists and the masks, hexadecimal
    source         index of the pair's source in `data.train` or `data.validation`
    chosen_reward, rejected_reward  score of each response; nan if not given
    ref_chosen_logps, ref_rejected_logps  log-probability of each response under a reference model, in nats, as given
                   in the data; nan if not given
    line           place of the pair's record in the source, from :func:`~dpo_engine.data.records.read_rows`; 0 if
                   unknown. If the source is a single file, this is the number of the line, array item or table row,
                   counted from 1
    prompt_text    hash of the prompt's text before tokenizing; 0 if unknown
    chosen_mask    [c]  bool, whether each token is scored; at least one token is. None means that all tokens are scored
    rejected_mask  [r]  bool, as `chosen_mask`, but for the rejected response

    With `data.score: all`, `prompt` is only the first token, and both responses begin with the rest of the prompt.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    weight: float
    margin: float
    digest: str
    source: int
    chosen_reward: float = float("nan")
    rejected_reward: float = float("nan")
    ref_chosen_logps: float = float("nan")
    ref_rejected_logps: float = float("nan")
    line: int = 0
    prompt_text: int = 0
    chosen_mask: np.ndarray | None = None
    rejected_mask: np.ndarray | None = None

    @property
    def scored_counts(self) -> tuple[int, int]:
        """The number of scored tokens of the chosen and of the rejected response."""
        chosen, rejected = (
            len(ids) if mask is None else int(mask.sum())
            for ids, mask in ((self.chosen, self.chosen_mask), (self.rejected, self.rejected_mask))
        )
        return chosen, rejected


def pair_digest(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_mask: np.ndarray | None = None,
    rejected_mask: np.ndarray | None = None,
) -> bytes:
    """Hash a pair's ids, the boundaries between its parts, and its masks. Other fields of the pair are not hashed."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for ids in (prompt, chosen, rejected):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    for name, mask in zip(MASKS, (chosen_mask, rejected_mask), strict=True):
        if mask is not None:
            digest.update(name.encode() + np.packbits(mask).tobytes())
    return digest.digest()


def digest_halves(digest: str) -> np.ndarray:
    """Split a pair's hexadecimal digest into two 64-bit halves [2] int64, which tensors can hold."""
    return np.frombuffer(bytes.fromhex(digest), dtype="<i8")


def part_digests(pairs: PairDataset, indices: np.ndarray) -> np.ndarray:
    """Hash each part of the pairs at `indices`: [n, 3] int64.

    Prompts have equal hashes if their ids are equal. Responses have equal hashes if their ids and masks are equal.
    """

    def keys(pair: TokenPair) -> list[int]:
        masks = (None, pair.chosen_mask, pair.rejected_mask)
        return [ids_key(ids, mask) for ids, mask in zip(pair[: len(PARTS)], masks, strict=True)]

    return np.array([keys(pairs[index]) for index in indices], dtype=np.int64).reshape(-1, len(PARTS))


def ids_key(ids: np.ndarray, mask: np.ndarray | None = None) -> int:
    """Return a 64-bit hash of token ids and their mask."""
    return _key(np.asarray(ids, dtype="<i4").tobytes() + (b"" if mask is None else np.packbits(mask).tobytes()))


def text_key(prompt: str | Sequence[Any]) -> int:
    """Return a 64-bit hash of a prompt's text or turns. The chat template and the tokenizer do not affect the hash."""
    if not isinstance(prompt, str):
        prompt = json.dumps([plain(turn) for turn in prompt], sort_keys=True)
    return _key(prompt.encode())


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


class _Lists:
    """One list column of one record batch, as views into the mapped file."""

    def __init__(self, column: pa.LargeListArray):
        self.offsets = column.offsets.to_numpy(zero_copy_only=True)
        self.values = column.values.to_numpy(zero_copy_only=True)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def sums(self) -> np.ndarray:
        """Return the sum of each list."""
        return np.diff(np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])[self.offsets])


class PairDataset:
    """The token pairs of a mapped Arrow file, or a subset of them.

    Opening the file reads all of it once, to check its hash. After that, ids are read when a pair is accessed.

    lengths     [n, 3]  int32, numbers of tokens in the prompt, the chosen and the rejected response
    weights     [n]     float64
    source_ids  [n]     int32, indices into `sources`
    scored      [n, 2]  int32, numbers of scored tokens in the chosen and the rejected response
    prompt_keys [n]     int64, hash of the prompt's ids; equal for equal prompts
    prompt_texts [n]    int64, hash of the prompt's text before tokenizing
    sources             names of the sources that the pairs come from
    digest              hash of all pairs in order, including their weights, sources and other numbers; for a subset,
                        hash of the original data set's digest and of the indices
    facts               the facts that were passed to :meth:`~dpo_engine.data.pair_writer.PairWriter.finish`
    """

    def __init__(self, path: str | Path, sources: Sequence[str] = ()):
        """Open a file that :class:`~dpo_engine.data.pair_writer.PairWriter` wrote.

        Raises `pyarrow.ArrowException`, `OSError`, `KeyError` or `ValueError` if the file is damaged or is not a file
        of token pairs.
        """
        self._map = pa.memory_map(str(path))
        reader = pa.ipc.open_file(self._map)
        if reader.schema != SCHEMA:
            raise pa.ArrowInvalid(f"{path}: is not a file of token pairs")
        last = reader.num_record_batches - 1
        metadata = dict(reader.get_batch_with_custom_metadata(last)[1] or {})
        batches = [reader.get_batch(i) for i in range(last)]
        content = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for batch in batches:
            batch.validate(full=True)  # otherwise, a damaged offset could point to memory outside the file
            add_content(content, batch)
        content.update(metadata[b"facts"] + metadata[b"digest"])
        if content.hexdigest().encode() != metadata[b"content"]:
            raise pa.ArrowInvalid(f"{path}: the content does not match its hash")
        self._lists = [[_Lists(batch[part]) for part in (*PARTS, *MASKS)] for batch in batches]
        self._stride = len(batches[0]) if batches else ROWS
        self._numbers = {name: _gather(batches, name, np.float64) for name in NUMBERS}
        self._digests = _gather(batches, "digest", f"V{DIGEST_BYTES}")
        self._lines = _gather(batches, "line", np.int64)
        self._rows: np.ndarray | None = None
        self.facts: dict[str, Any] = parse_object(metadata[b"facts"])
        self.digest: str = metadata[b"digest"].decode()
        self.sources = list(sources)
        self.weights = _gather(batches, "weight", np.float64)
        self.source_ids = _gather(batches, "source", np.int32)
        self.prompt_keys = _gather(batches, "prompt_key", np.int64)
        self.prompt_texts = _gather(batches, "prompt_text", np.int64)
        lengths = [np.stack([np.diff(column.offsets) for column in lists[: len(PARTS)]], 1) for lists in self._lists]
        self.lengths = np.concatenate([np.empty((0, 3)), *lengths]).astype(np.int32)
        counts = [np.stack([column.sums() for column in lists[len(PARTS) :]], 1) for lists in self._lists]
        counts = np.concatenate([np.empty((0, 2)), *counts]).astype(np.int32)
        self.scored = np.where(counts > 0, counts, self.lengths[:, 1:])  # without a mask all tokens are scored

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> TokenPair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} is out of range; there are {len(self)} pairs")
        row = int(index if self._rows is None else self._rows[index])
        lists = (column[row % self._stride] for column in self._lists[row // self._stride])
        prompt, chosen, rejected, *masks = lists
        chosen_mask, rejected_mask = (mask.astype(bool) if len(mask) else None for mask in masks)
        return TokenPair(
            prompt,
            chosen,
            rejected,
            weight=float(self.weights[index]),
            digest=self._digests[row].tobytes().hex(),
            source=int(self.source_ids[index]),
            line=int(self._lines[row]),
            prompt_text=int(self.prompt_texts[index]),
            chosen_mask=chosen_mask,
            rejected_mask=rejected_mask,
            **{name: float(column[row]) for name, column in self._numbers.items()},
        )

    def prompt(self, index: int) -> np.ndarray:
        """Return the ids of a pair's prompt, without reading the rest of the pair."""
        row = int(index if self._rows is None else self._rows[index])
        return self._lists[row // self._stride][0][row % self._stride]

    def place(self, index: int) -> str:
        """Return the location of a pair's record, as `file:line`."""
        row = int(index if self._rows is None else self._rows[index])
        return locate(self.sources[self.source_ids[index]], int(self._lines[row]))

    def numbers(self, name: str) -> np.ndarray:
        """Return one of the columns in `NUMBERS`, [n]; a value is nan if the data does not give it."""
        return self._numbers[name] if self._rows is None else self._numbers[name][self._rows]

    @property
    def digests(self) -> np.ndarray:
        """The hash of each pair's ids and masks, as two 64-bit halves [n, 2] int64."""
        rows = self._digests if self._rows is None else self._digests[self._rows]
        return np.frombuffer(rows.tobytes(), dtype="<i8").reshape(-1, 2)

    def subset(self, indices: np.ndarray) -> PairDataset:
        """Return a view of the pairs at `indices`, in the order of `indices`."""
        view = object.__new__(PairDataset)
        view.__dict__.update(self.__dict__)
        view._rows = np.asarray(indices) if self._rows is None else self._rows[indices]
        view.weights, view.source_ids = self.weights[indices], self.source_ids[indices]
        view.lengths, view.scored = self.lengths[indices], self.scored[indices]
        view.prompt_keys = self.prompt_keys[indices]
        view.prompt_texts = self.prompt_texts[indices]
        digest = hashlib.blake2b(self.digest.encode(), digest_size=DIGEST_BYTES)
        digest.update(np.asarray(indices, dtype="<i8").tobytes())
        view.digest = digest.hexdigest()
        return view


def add_content(content: hashlib.blake2b, batch: pa.RecordBatch) -> None:
    """Add the content of a record batch to a hash."""
    for column in batch.columns:
        lists = pa.types.is_large_list(column.type)
        for array in (column.offsets, column.values) if lists else (column,):
            content.update(_plain(array, np.uint8))


def _plain(column: pa.Array, dtype: Any) -> np.ndarray:
    """Return a view into the file: the numbers of a column or, for a column of bytes, its bytes as `dtype`."""
    if pa.types.is_fixed_size_binary(column.type):
        return np.frombuffer(
            column.buffers()[1], dtype=dtype, count=len(column) * DIGEST_BYTES // np.dtype(dtype).itemsize
        )
    return column.to_numpy(zero_copy_only=True)


def _gather(batches: Sequence[pa.RecordBatch], name: str, dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(_plain(batch[name], dtype) for batch in batches)])


def shared_pairs(train: PairDataset, held_out: PairDataset) -> int:
    """Return the number of pairs of ``held_out`` that are also in ``train``, with the same tokens and masks."""
    ours, theirs = train.digests, held_out.digests  # [n, 2], the halves of each digest
    candidates = set(map(tuple, ours[np.isin(ours[:, 0], theirs[:, 0])].tolist()))
    return sum(tuple(digest) in candidates for digest in theirs.tolist())
