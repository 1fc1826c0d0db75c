"""Build batches in layout `tree`: put the pairs of a micro-batch into one row in which pairs share prompts.

Problem. In layout `stacked`, the model computes a prompt once for each response, which is twice for each pair with
this prompt. Rows are padded to the longest row. With long prompts or uneven lengths, much of
the computation is repeated or wasted.

Solution. A prompt and its responses form a tree of segments: the prompt is the root, and each distinct response is a
child. The row is the concatenation of all trees of a micro-batch, without padding between them. `Batch.segments`
contains the length and the parent of each segment. With the attention mask of this layout, a token sees itself, the
earlier tokens of its segment, and all tokens of the parent segment, but no others. Every response starts at position
len(prompt), wherever it is in the row. Each token therefore sees the same tokens at the same positions as in a separate
row, and log-probabilities agree with layout `stacked` up to rounding.

Scoring. The last token of a prompt predicts the first token of each response to the prompt. The last column of a
prompt can therefore have several sites, one for each response. If several pairs share a response, the response is in
the row once and is scored once. All of these pairs read the same log-probabilities through `Scored.take`. The last
layer computes outputs only for the columns that predict a scored token (:func:`needed_columns`). From the other
columns, which include most of a long prompt, the last layer needs only keys and values.

Why one level. If pairs share prompts, adjacent pairs with equal prompts form one tree, in which responses with equal
tokens and scoring masks are also shared. :mod:`~dpo_engine.batching.packing` makes pairs with the same prompt adjacent.
One level of responses below a prompt covers the repetition that preference pairs always have (several responses to one
prompt), and needs no search for common prefixes. The attention kernels accept trees of any depth.

Not covered. Common prefixes of different prompts (a system prompt, for example) or of different responses are not
shared. A prompt is computed again in every micro-batch that has pairs with this prompt. Context parallelism, sequence
parallelism, FP8, interleaved schedules, and rows of a fixed size may need padding at the end of the row; this padding
consists of separate trees that no other token sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dpo_engine.batching.batches import DUMMY_LENGTH, Batch, as_scored, pair_columns, scored_offsets
from dpo_engine.batching.blocks import padded_length
from dpo_engine.data.dataset import TokenPair

PADDING = 256
"""Maximum length of a segment of padding. Attention in longer segments would cost more, and positions could exceed
the maximum position of the model."""


def plant(
    pairs: Sequence[TokenPair | None],
    indices: Sequence[int] | np.ndarray,
    *,
    pad_id: int,
    share: bool = True,
    cp_size: int = 1,
    multiple: int = 1,
    length: int | None = None,
) -> Batch:
    """Collate pairs in layout `tree`: one row of token trees.

    pairs     b pairs, ordered so that pairs with the same prompt are adjacent; None is a dummy, with no tokens and
              weight 0
    indices   [b]  indices of the pairs in the data set; -1 for a dummy
    pad_id    padding token at the end of the row
    share     whether responses to the same prompt share one copy of the prompt; if false, each response has its own
              copy (plain packing)
    cp_size, multiple   arguments of :func:`~dpo_engine.batching.blocks.padded_length`, which returns the row's length
    length    minimum length of the row

    Example: two pairs with prompt 11 12. In the first, 21 2 is chosen and 31 2 is rejected; in the second,
    21 2 is chosen and 32 33 2 is rejected. Token 2 is EOS.

    >>> def ids(*numbers):
    ...     return np.array(numbers, dtype=np.int32)
    >>> nan = float("nan")
    >>> first = TokenPair(ids(11, 12), ids(21, 2), ids(31, 2), 1.0, nan, "0a" * 16, 0)
    >>> second = TokenPair(ids(11, 12), ids(21, 2), ids(32, 33, 2), 1.0, nan, "0b" * 16, 0)
    >>> batch = plant([first, second], [7, 4], pad_id=0)
    >>> batch.tokens, batch.positions
    (tensor([[11, 12, 21,  2, 31,  2, 32, 33,  2]]), tensor([0, 1, 2, 3, 2, 3, 2, 3, 4]))
    >>> batch.segments
    tensor([[ 2,  2,  2,  3],
            [-1,  0,  0,  0]])
    >>> batch.scored.sites, batch.scored.targets
    (tensor([1, 2, 1, 4, 1, 6, 7]), tensor([21,  2, 31,  2, 32, 33,  2]))
    >>> batch.scored.take, batch.scored.owner
    (tensor([0, 1, 2, 3, 0, 1, 4, 5, 6]), tensor([0, 0, 2, 2, 1, 1, 3, 3, 3]))
    """
    row = _Row(share)
    parts: list[list[np.ndarray]] = [[] for _ in range(3)]
    ends: list[tuple[int, int]] = []
    together: list[bool] = []
    entries = 0
    for place, pair in enumerate(pairs):
        together.append(pair is not None and row.goes_on(pair.prompt))
        if pair is not None:
            both, counts = min(pair.scored_counts), pair.scored_counts
            responses = ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask))
            for owner, (response, mask), count in zip((place, len(pairs) + place), responses, counts, strict=True):
                first = row.first_site(pair.prompt, response, mask)
                parts[0].append(np.arange(first, first + count))
                parts[1].append(np.full(count, owner))
                parts[2].append((np.arange(count) < both).astype(np.int64))
                entries += count
        ends.append((row.scored, entries))
    row.fill(padded_length(max(row.length, length or DUMMY_LENGTH), cp_size, multiple), pad_id)
    return Batch(
        tokens=torch.from_numpy(np.concatenate(row.tokens))[None],
        positions=torch.from_numpy(np.concatenate(row.positions)),
        segments=torch.tensor([row.lengths, row.parents]),
        columns=None,
        scored=as_scored([row.sites, row.targets, *parts], ends, together),
        **pair_columns(pairs, indices),
    )


def needed_columns(batch: Batch, multiple: int) -> torch.Tensor:
    """Return the columns of a rank's share that predict a scored token. The last layer computes only these columns.

    multiple  the number of columns is rounded up to a multiple of this number. The added columns are the first few of
              those that predict no scored token

    Returns   [q] int64, ascending, q >= 1
    """
    needed = torch.zeros(batch.tokens.shape[1], dtype=torch.bool)
    needed[batch.scored.sites] = True
    count = int(needed.sum())
    missing = -(-max(count, 1) // multiple) * multiple - count
    needed[torch.nonzero(~needed).flatten()[:missing]] = True
    return torch.nonzero(needed).flatten()


class _Row:
    """A row under construction: the segments added so far, and the sites to score."""

    def __init__(self, share: bool):
        self.share = share
        self.length = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.sites: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.scored = 0
        self._prompt: bytes | None = None
        self._root = 0  # index of the prompt's segment
        self._behind = 0  # first column after the prompt
        self._leaves: dict[bytes, int] = {}

    def _segment(self, ids: np.ndarray, parent: int, position: int) -> None:
        self.tokens.append(np.asarray(ids, dtype=np.int64))
        self.positions.append(np.arange(position, position + len(ids)))
        self.lengths.append(len(ids))
        self.parents.append(parent)
        self.length += len(ids)

    def goes_on(self, prompt: np.ndarray) -> bool:
        """Return whether a pair with this prompt belongs to the last tree of the row."""
        return self.share and np.asarray(prompt).tobytes() == self._prompt

    def first_site(self, prompt: np.ndarray, response: np.ndarray, mask: np.ndarray | None) -> int:
        """Return the index of a response's first site. Add the prompt and the response to the row if they are new.

        If responses do not share prompts, the prompt and the response are always added.
        """
        name = np.asarray(prompt).tobytes()
        if name != self._prompt:
            self._prompt, self._leaves = name, {}
            if self.share:
                self._root = len(self.lengths)
                self._segment(prompt, -1, 0)
                self._behind = self.length
        leaf = np.asarray(response).tobytes() + (b"" if mask is None else mask.tobytes())
        if not self.share or leaf not in self._leaves:
            self._leaves[leaf] = self.scored
            count, start = len(response), self.length
            if self.share:
                self._segment(response, self._root, len(prompt))
                predicting = np.concatenate([[self._behind - 1], np.arange(start, start + count - 1)])
            else:
                self._segment(np.concatenate([prompt, response]), -1, 0)
                predicting = np.arange(start + len(prompt) - 1, self.length - 1)
            offsets = scored_offsets(response, mask)
            self.sites.append(predicting[offsets])
            self.targets.append(np.asarray(response, dtype=np.int64)[offsets])
            self.scored += len(offsets)
        return self._leaves[leaf]

    def fill(self, length: int, pad_id: int) -> None:
        """Pad the row to `length`, with segments of at most `PADDING` tokens."""
        while length > self.length:
            self._segment(np.full(min(length - self.length, PADDING), pad_id), -1, 0)
