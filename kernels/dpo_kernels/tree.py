"""The attention mask of a row of concatenated token trees. The host builds it once for all layers that share it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.transfer import to_device

Ints = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Tree:
    """A row of n tokens that is divided into segments, which form one or more trees.

    lengths  [segments]  number of tokens in each segment; the segments follow each other without gaps
    parents  [segments]  number of the parent segment, -1 for a root
    rows     [n_q]       indices of the tokens that are queries, ascending; every token of the row is a key

    A token sees all tokens of its segment's ancestors, and the tokens of its own segment up to and including itself.
    Segments are in depth-first order, so a segment's descendants follow it directly. The tokens that see a given token
    are therefore contiguous: the token itself and all tokens after it, up to the end of its segment's subtree. Two
    numbers per key (`first`, `stop`) describe the whole mask, even if the queries are a subset of the row.

    >>> pair = Tree.of(lengths=[2, 2, 1], parents=[-1, 0, 0])  # prompt, chosen, rejected
    >>> pair.first, pair.stop
    (array([0, 1, 2, 3, 4]), array([5, 5, 4, 4, 5]))
    >>> pair.visible  # 3 in the prompt, 3 + 4 for the chosen tokens, 3 for the rejected token
    13
    >>> last = pair.select([1, 3, 4])
    >>> last.first, last.stop, last.visible
    (array([0, 0, 1, 1, 2]), array([3, 3, 2, 2, 3]), 9)
    """

    lengths: np.ndarray
    parents: np.ndarray
    rows: np.ndarray
    _prepared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Ints, parents: Ints, rows: Ints | None = None) -> Tree:
        """Build a tree from a table of segments. Without ``rows``, every token is a query.

        Raises ``ValueError`` if the table is not a forest of non-empty segments in depth-first order, or if ``rows`` is
        not strictly ascending or not within the row.
        """
        lengths, parents = np.asarray(lengths, dtype=np.int64), np.asarray(parents, dtype=np.int64)
        if lengths.ndim != 1 or lengths.shape != parents.shape or not lengths.size:
            raise ValueError(
                f"tree: lengths has the shape {lengths.shape}, and parents has the shape {parents.shape}; both must be "
                "non-empty lists of equal length"
            )
        if (lengths < 1).any():
            raise ValueError(f"tree: segment {int(np.argmax(lengths < 1))} has no tokens; leave it out")
        path: list[int] = []  # the previous segment and its ancestors, root first
        for segment, parent in enumerate(parents.tolist()):
            while path and path[-1] != parent:
                path.pop()
            if not path and parent != -1:
                raise ValueError(
                    f"tree: segment {segment} has parent {parent}; the parent must be the previous segment, an "
                    "ancestor of the previous segment, or -1 (depth-first order)"
                )
            path.append(segment)
        n = int(lengths.sum())
        chosen = np.arange(n) if rows is None else np.asarray(rows, dtype=np.int64)
        ascending = chosen.ndim == 1 and (np.diff(chosen) > 0).all()
        if not ascending or (chosen.size and not (0 <= chosen[0] and chosen[-1] < n)):
            raise ValueError(f"tree: rows must be strictly ascending indices, each between 0 and {n - 1}")
        return cls(lengths, parents, chosen)

    def select(self, rows: Ints) -> Tree:
        """Return a tree with the same segments, and with ``rows`` as queries. Raises like :meth:`of`."""
        return Tree.of(self.lengths, self.parents, rows)

    @property
    def n(self) -> int:
        """Number of tokens in the row. Every token is a key."""
        return int(self.lengths.sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of each segment's first token [segments]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def subtree_ends(self) -> np.ndarray:
        """End of each segment's subtree [segments]: the index after the last token of its last descendant."""
        ends = self.starts + self.lengths
        for segment in range(len(ends) - 1, 0, -1):
            parent = self.parents[segment]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[segment])
        return ends

    @cached_property
    def first(self) -> np.ndarray:
        """For each token, the index in ``rows`` of the first query that sees it [n]."""
        return np.searchsorted(self.rows, np.arange(self.n))

    @cached_property
    def stop(self) -> np.ndarray:
        """For each token, the index in ``rows`` after the last query that sees it [n]."""
        return np.searchsorted(self.rows, np.repeat(self.subtree_ends, self.lengths))

    @cached_property
    def positions(self) -> np.ndarray:
        """Position of each token on the path from its root [n]; a segment's positions continue those of its parent."""
        before = np.zeros_like(self.lengths)
        for segment, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                before[segment] = before[parent] + self.lengths[parent]
        return np.arange(self.n) - np.repeat(self.starts - before, self.lengths)

    def effective(self, window: int | None) -> int | None:
        """Return ``window``, or None if the window has no effect because no path is longer than the window."""
        return None if window is None or window > self.positions.max() else window

    @property
    def visible(self) -> int:
        """Number of visible (query, key) pairs without a window. The cost of attention is proportional to it."""
        return int((self.stop - self.first).sum())

    def reached(self, window: int | None = None) -> np.ndarray:
        """Return whether each token is seen by a query [n] bool.

        window  as in :func:`dpo_kernels.eager.tree_attention`
        """
        reached = self.first < self.stop
        if window is not None:
            first, stop = self.first[reached], self.stop[reached]
            # Positions do not ascend over all queries that see a token, because these queries can be on several paths.
            nearest = _minima(self.positions[self.rows], first, stop)
            reached[reached] = nearest - self.positions[reached] < window
        return reached

    def seen_by(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``first`` and ``stop`` as int64 tensors on ``device``."""
        both = (self.first, self.stop)
        return self.prepared(
            ("seen_by", device), lambda: tuple(to_device([torch.from_numpy(ends) for ends in both], device))
        )

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the positions of the queries [n_q] and of the keys [n] as int64 tensors on ``device``."""
        both = (self.positions[self.rows], self.positions)
        return self.prepared(
            ("places", device), lambda: tuple(to_device([torch.from_numpy(each) for each in both], device))
        )

    def prepared(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Return ``build()``, cached under ``key``. Backends use this to cache what they derive from the tree."""
        if key not in self._prepared:
            self._prepared[key] = build()
        return self._prepared[key]


def _minima(values: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return the minimum of each range of values, first <= i < stop; no range is empty."""
    minima = np.empty(len(first), dtype=values.dtype)
    width = 1
    while (wide := stop - first >= width).any():  # values[i] is the minimum of `width` original values from i on
        minima[wide] = np.minimum(values[first[wide]], values[stop[wide] - width])
        values, width = np.minimum(values[:-width], values[width:]), 2 * width
    return minima
