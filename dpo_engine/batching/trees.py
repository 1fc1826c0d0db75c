"""Token pairs as one row of trees: each prompt once, its responses behind it, no padding between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dpo_engine.batching.batches import DUMMY_LENGTH, Batch, as_scored, pair_columns
from dpo_engine.batching.blocks import padded_length
from dpo_engine.data.dataset import TokenPair


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
    """One row of token trees. A prompt's responses start at the position behind it; so does each further one.

    pairs     b pairs, those of one prompt next to each other; None is a dummy, of which nothing is scored
    indices   [b]  their numbers in the data set, -1 for a dummy
    pad_id    what fills the end of the row, a tree of its own that nobody else sees
    share     whether a prompt stands once for all its responses; without, each response has its own
    cp_size, multiple   the row's length is as :func:`~dpo_engine.batching.blocks.padded_length` says
    length    the row is at least this long

    Two pairs of one prompt 11 12 that prefer 21 2 to 31 2, and 21 2 to 32 33 2; EOS is 2:

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
            both = min(len(pair.chosen), len(pair.rejected))
            for owner, response in ((place, pair.chosen), (len(pairs) + place, pair.rejected)):
                first = row.first_site(pair.prompt, response)
                count = len(response)
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
    """The columns of a share that something is predicted from: all that the model's last layer has to go on with.

    multiple  how many there are divides by this: columns that are not needed are added, the first ones

    Returns   [q] int64, ascending, q >= 1
    """
    needed = torch.zeros(batch.tokens.shape[1], dtype=torch.bool)
    needed[batch.scored.sites] = True
    count = int(needed.sum())
    missing = -(-max(count, 1) // multiple) * multiple - count
    needed[torch.nonzero(~needed).flatten()[:missing]] = True
    return torch.nonzero(needed).flatten()


class _Row:
    """A row in the making: segments one behind the other, and the sites of what is scored."""

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
        self._root = 0  # number of the prompt's segment
        self._behind = 0  # the column behind the prompt
        self._leaves: dict[bytes, int] = {}

    def _segment(self, ids: np.ndarray, parent: int, position: int) -> None:
        self.tokens.append(np.asarray(ids, dtype=np.int64))
        self.positions.append(np.arange(position, position + len(ids)))
        self.lengths.append(len(ids))
        self.parents.append(parent)
        self.length += len(ids)

    def goes_on(self, prompt: np.ndarray) -> bool:
        """Whether a pair of this prompt belongs to the tree that was put in last."""
        return self.share and np.asarray(prompt).tobytes() == self._prompt

    def first_site(self, prompt: np.ndarray, response: np.ndarray) -> int:
        """Index of the first site of a response behind a prompt; both are put into the row where they are new."""
        name = np.asarray(prompt).tobytes()
        if name != self._prompt:
            self._prompt, self._leaves = name, {}
            if self.share:
                self._root = len(self.lengths)
                self._segment(prompt, -1, 0)
                self._behind = self.length
        leaf = np.asarray(response).tobytes()
        if not self.share or leaf not in self._leaves:
            self._leaves[leaf] = self.scored
            count, start = len(response), self.length
            if self.share:
                self._segment(response, self._root, len(prompt))
                predicting = np.concatenate([[self._behind - 1], np.arange(start, start + count - 1)])
            else:
                self._segment(np.concatenate([prompt, response]), -1, 0)
                predicting = np.arange(start + len(prompt) - 1, self.length - 1)
            self.sites.append(predicting)
            self.targets.append(np.asarray(response, dtype=np.int64))
            self.scored += count
        return self._leaves[leaf]

    def fill(self, length: int, pad_id: int) -> None:
        """Pad the row to a length."""
        if length > self.length:
            self._segment(np.full(length - self.length, pad_id), -1, 0)
