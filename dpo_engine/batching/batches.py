"""Collate tokenized pairs into tensors: a micro-batch of whole pairs, in one of two layouts.

- `stacked`: one row for each response, with the prompt before it, padded to the longest row.
- `tree`: a single row with almost no padding, in which pairs can share a prompt (:mod:`~dpo_engine.batching.trees`).

Both layouts give the same log-probabilities, up to rounding. In both layouts, :class:`Scored` lists the tokens to
score, so code that runs after the model does not depend on the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_engine.batching.shares import share_columns
from dpo_engine.data.dataset import TokenPair, digest_halves
from dpo_kernels.transfer import Transfer

DUMMY_LENGTH = 2
CHUNK_SITES = 1024
"""Maximum number of sites (see :class:`Scored`) whose logits are in memory at the same time.

A pair with more sites is scored in pieces. A group of pairs that share sites is also scored in pieces if the group has
more sites."""
NO_DIGEST = np.zeros(2, dtype=np.int64)


class Scored(NamedTuple):
    """The tokens to score (sites), and the responses to which they belong (entries).

    If several pairs share a response, each scored token of the response has one site, and one entry per pair.

    sites    [m]  int64, index of the predicting token in the flattened hidden states `[s, r]`: column times r plus row
    targets  [m]  int64, the token to predict at each site
    take     [e]  int64, the site of each entry, as an index into `sites`
    owner    [e]  int64, the response of each entry: i for the chosen response of pair i, b + i for the rejected one
    shared   [e]  bool: the k-th scored token of a response is shared if the other response of the pair has at least k
                  scored tokens
    chunks        consecutive ranges of pairs; no two ranges have a site in common. Each range is given as the indices
                  after its last site, its last entry, and its last pair
    """

    sites: Tensor
    targets: Tensor
    take: Tensor
    owner: Tensor
    shared: Tensor
    chunks: tuple[tuple[int, int, int], ...]

    def within(self, columns: Tensor, rows: int) -> Scored:
        """Return only the sites in the given columns, with their entries.

        The result numbers columns, sites, and entries anew: the given column ``columns[i]`` becomes column i.

        columns  [s']  int64, in any order
        rows           r, the number of rows
        """
        length = int(max(columns.max(), self.sites.max() // rows if len(self.sites) else 0)) + 1
        place = torch.full((length,), -1, dtype=torch.int64)
        place[columns] = torch.arange(len(columns))
        column = place[self.sites // rows]
        kept = column >= 0
        number = kept.cumsum(0) - 1
        taken = kept[self.take]
        return Scored(
            sites=(column * rows + self.sites % rows)[kept],
            targets=self.targets[kept],
            take=number[self.take[taken]],
            owner=self.owner[taken],
            shared=self.shared[taken],
            chunks=tuple((int(kept[:m].sum()), int(taken[:e].sum()), b) for m, e, b in self.chunks),
        )


@dataclass
class Batch:
    """A micro-batch of b pairs as r rows of s tokens, or the part of each row for one context-parallel rank.

    A dummy is a placeholder for a pair. Dummies are added so that all ranks have the same number of pairs. They do not
    change losses or metrics.

    tokens     [r, s]   int64. Layout `stacked`: r = 2b; row i contains the prompt and the chosen response of pair i,
                        and row b + i contains its prompt and its rejected response. Layout `tree`: r = 1
    positions  [s]      int64, position of each column for the rotary embedding
    segments   [2, k]   int64, in host memory: lengths and parents of the segments in a tree row. In a
                        context-parallel share, too, these are the segments of the whole row. None in layout `stacked`
    columns    [q]      int64, in host memory: the columns of a tree row that the last layer computes
                        (:func:`~dpo_engine.batching.trees.needed_columns`); None means all columns
    scored              the tokens to score
    weights    [b]      fp32, factors of the pairs' losses; 0 for a dummy
    margins    [b]      fp32; nan if the record has none; 0 for a dummy
    chosen_rewards, rejected_rewards, ref_chosen_logps, ref_rejected_logps  [b]  fp32; nan if the record has none; 0 for
                        a dummy
    chosen_tokens, rejected_tokens    [b]  fp32, number of scored tokens in each response; 0 for a dummy
    source     [b]      int64, index of the pair's source; 0 for a dummy
    digest     [b, 2]   int64, in host memory: hash of the pair's token ids and masks, in two halves; 0 for a dummy
    index      [b]      int64, index of the pair in its data set; -1 for a dummy
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor | None
    columns: Tensor | None
    scored: Scored
    weights: Tensor
    margins: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    source: Tensor
    digest: Tensor
    index: Tensor

    @property
    def num_pairs(self) -> int:
        """Number of pairs, not counting dummies."""
        return int((self.index >= 0).sum())

    def shard(self, cp_rank: int, cp_size: int) -> Batch:
        """Return one context-parallel rank's share of the batch (:func:`~dpo_engine.batching.shares.share_columns`).

        Returns  a batch with s / cp_size columns; `segments` and the tensors with values per pair are unchanged

        Raises `ValueError` if the columns cannot be split into equal parts.
        """
        if cp_size == 1:
            return self
        positions = None if self.segments is None else self.positions.numpy()
        columns = torch.from_numpy(share_columns(len(self.positions), cp_size, positions)[cp_rank])
        return dataclasses.replace(
            self,
            tokens=self.tokens[:, columns],
            positions=self.positions[columns],
            scored=self.scored.within(columns, len(self.tokens)),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy on a device, made in one transfer. Fields that the host reads remain in host memory."""
        return self.packed_for(device)()

    def packed_for(self, device: torch.device | str) -> Callable[[], Batch]:
        """Lay the batch out in host memory for one transfer to a device.

        Returns  a function that makes the transfer and returns the copy
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {name: fields.pop(name) for name in ("segments", "columns", "digest")}
        *scored, chunks = fields.pop("scored")
        transfer = Transfer([tensor.contiguous() for tensor in (*fields.values(), *scored)], device)

        def copy() -> Batch:
            moved = transfer.run()
            there = Scored(*moved[len(fields) :], chunks=chunks)
            return Batch(**dict(zip(fields, moved[: len(fields)], strict=True)), **kept, scored=there)

        return copy


def pair_columns(pairs: Sequence[TokenPair | None], indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
    """Return the tensors of :class:`Batch` that contain values per pair, by name. A pair that is None is a dummy."""

    def column(name: str) -> Tensor:
        return torch.tensor([0.0 if pair is None else getattr(pair, name) for pair in pairs], dtype=torch.float32)

    sizes = torch.tensor([(0, 0) if pair is None else pair.scored_counts for pair in pairs])
    return {
        "weights": column("weight"),
        "margins": column("margin"),
        "chosen_rewards": column("chosen_reward"),
        "rejected_rewards": column("rejected_reward"),
        "ref_chosen_logps": column("ref_chosen_logps"),
        "ref_rejected_logps": column("ref_rejected_logps"),
        "chosen_tokens": sizes[:, 0].float(),
        "rejected_tokens": sizes[:, 1].float(),
        "source": torch.tensor([0 if pair is None else pair.source for pair in pairs]),
        "digest": torch.from_numpy(np.stack([digest_halves(pair.digest) if pair else NO_DIGEST for pair in pairs])),
        "index": torch.tensor(np.asarray(indices), dtype=torch.int64),
    }


def scored_offsets(response: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return the offsets of the scored tokens in a response, in ascending order. A mask of None means all tokens."""
    return np.arange(len(response)) if mask is None else np.flatnonzero(mask)


def as_scored(
    parts: Sequence[Sequence[np.ndarray]], ends: Sequence[tuple[int, int]], together: Sequence[bool]
) -> Scored:
    """Return a :class:`Scored` whose tensors are concatenated from pieces.

    parts     the pieces of sites, targets, take, owner, and shared
    ends      for each pair, the end offsets of its sites and of its entries
    together  for each pair, whether it may share sites with the pair before it
    """
    empty = np.empty(0, dtype=np.int64)
    sites, targets, take, owner, shared = (torch.from_numpy(np.concatenate([empty, *pieces])) for pieces in parts)
    chunks: list[tuple[int, int, int]] = []
    start = 0
    # stops: for each range of pairs that may share sites, the index after its last pair.
    stops = [pair for pair in range(1, len(ends)) if not together[pair]] + [len(ends)]
    for stop, following in zip(stops, [*stops[1:], None], strict=True):
        if following is None or ends[following - 1][0] - start > CHUNK_SITES:
            chunks.append((*ends[stop - 1], stop))
            start = ends[stop - 1][0]
    return Scored(sites, targets, take, owner, shared.bool(), tuple(chunks))


def collate(
    pairs: Sequence[TokenPair | None],
    indices: Sequence[int] | np.ndarray,
    *,
    pad_id: int,
    multiple: int = 1,
    length: int | None = None,
) -> Batch:
    """Collate pairs in layout `stacked`: one row per response, padded on the right to the longest row.

    pairs     b pairs; None is a dummy, with two padding tokens, no scored tokens, and weight 0
    indices   [b]  indices of the pairs in the data set; -1 for a dummy
    pad_id    padding token; it is never scored, and causal attention hides it from all scored tokens
    multiple  the number of columns is rounded up to a multiple of this number
    length    minimum number of columns

    Example: prompt 11 12 with the responses 21 22 2 and 31 2, and prompt 13 with the responses 23 2 and 33 34 35 2,
    where 2 is EOS:

    >>> def ids(*numbers):
    ...     return np.array(numbers, dtype=np.int32)
    >>> nan = float("nan")
    >>> first = TokenPair(ids(11, 12), ids(21, 22, 2), ids(31, 2), 1.0, nan, "0a" * 16, 0)
    >>> second = TokenPair(ids(13), ids(23, 2), ids(33, 34, 35, 2), 0.5, 3.0, "0b" * 16, 0)
    >>> batch = collate([first, second], [7, 4], pad_id=0, multiple=2)
    >>> batch.tokens
    tensor([[11, 12, 21, 22,  2,  0],
            [13, 23,  2,  0,  0,  0],
            [11, 12, 31,  2,  0,  0],
            [13, 33, 34, 35,  2,  0]])
    >>> batch.scored.sites, batch.scored.targets
    (tensor([ 4,  8, 12,  6, 10,  1,  5,  3,  7, 11, 15]), tensor([21, 22,  2, 31,  2, 23,  2, 33, 34, 35,  2]))
    >>> batch.scored.owner, batch.scored.shared.int()
    (tensor([0, 0, 0, 2, 2, 1, 1, 3, 3, 3, 3]), tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.int32))
    >>> batch.positions, batch.weights, batch.margins, batch.index
    (tensor([0, 1, 2, 3, 4, 5]), tensor([1.0000, 0.5000]), tensor([nan, 3.]), tensor([7, 4]))
    >>> batch.chosen_tokens, batch.rejected_tokens
    (tensor([3., 2.]), tensor([2., 4.]))
    """

    responses = [pair and pair.chosen for pair in pairs] + [pair and pair.rejected for pair in pairs]
    masks = [pair and pair.chosen_mask for pair in pairs] + [pair and pair.rejected_mask for pair in pairs]
    rows = list(zip([*pairs, *pairs], responses, masks, strict=True))
    longest = max(DUMMY_LENGTH if pair is None else len(pair.prompt) + len(response) for pair, response, _ in rows)
    columns = -(-max(longest, length or 0) // multiple) * multiple
    tokens = np.full((len(rows), columns), pad_id, dtype=np.int64)
    parts: list[list[np.ndarray]] = [[] for _ in range(5)]
    ends: list[tuple[int, int]] = []
    scored = 0
    for row in (row for place in range(len(pairs)) for row in (place, len(pairs) + place)):
        pair, response, mask = rows[row]
        if pair is not None:
            start = len(pair.prompt)
            tokens[row, :start] = pair.prompt
            tokens[row, start : start + len(response)] = response
            offsets = scored_offsets(response, mask)
            count, both = len(offsets), min(pair.scored_counts)
            fields = (
                (start - 1 + offsets) * len(rows) + row,
                np.asarray(response, dtype=np.int64)[offsets],
                np.arange(scored, scored + count),
                np.full(count, row),
                (np.arange(count) < both).astype(np.int64),
            )
            for part, field in zip(parts, fields, strict=True):
                part.append(field)
            scored += count
        if row >= len(pairs):
            ends.append((scored, scored))
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.arange(columns),
        segments=None,
        columns=None,
        scored=as_scored(parts, ends, [False] * len(pairs)),
        **pair_columns(pairs, indices),
    )
