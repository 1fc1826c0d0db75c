"""Tests of the keys and values that context-parallel ranks send each other in layers with a sliding window."""

import numpy as np
import pytest
import torch

from dpo_engine.batching.blocks import padded_length
from dpo_engine.model.attention import _row_share, _tree_share

CPU = torch.device("cpu")


def visible(lengths, parents, window):
    """Return which keys each token sees, [n, n], computed by walking from the token toward the root."""
    n, ends = sum(lengths), np.cumsum(lengths)
    before = list(range(-1, n - 1))  # for each token, the previous token on its path
    for segment, parent in enumerate(parents):
        before[ends[segment] - lengths[segment]] = int(ends[parent]) - 1 if parent >= 0 else -1
    seen = np.zeros((n, n), dtype=bool)
    for token in range(n):
        place, steps = token, 0
        while place >= 0 and steps < window:
            seen[token, place] = True
            place, steps = before[place], steps + 1
    return seen


def tree_row(cp):
    lengths, parents = [150, 300, 290, 60, 33, 40], [-1, 0, 0, -1, 3, 3]
    rest = padded_length(sum(lengths), cp) - sum(lengths)
    return ([*lengths, rest], [*parents, -1]) if rest else (lengths, parents)


@pytest.mark.parametrize("rows", ["causal", "trees"])
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("window", [1, 7, 100, 400])
def test_ranks_send_what_the_others_see_and_nothing_else(rows, cp, window):
    lengths, parents = ([960], [-1]) if rows == "causal" else tree_row(cp)
    table = np.array([lengths, parents], dtype=np.int64).tobytes()
    shares = [_row_share(960, r, cp) if rows == "causal" else _tree_share(table, r, cp) for r in range(cp)]
    plans, seen = [share.windows(window, CPU) for share in shares], visible(lengths, parents, window)
    for mine, plan in enumerate(plans):
        own = plan.own.numpy()
        wanted = set(np.flatnonzero(seen[own].any(axis=0))) - set(own)
        assert set(torch.cat(plan.received).tolist()) == wanted
        for other in range(cp):
            sent = plans[other].own[plans[other].sent[mine]]
            assert torch.equal(sent, plan.received[other])


def test_causal_rows_exchange_the_ends_of_neighboring_chunks():
    length, cp, window = 16384, 8, 256
    for rank in range(cp):
        plan = _row_share(length, rank, cp).windows(window, CPU)
        received = sum(len(columns) for columns in plan.received)
        # Each chunk needs the end of the previous chunk. Rank 0 has the first chunk, which has no previous chunk. The
        # two chunks of the last rank are adjacent, so the second chunk needs nothing from other ranks.
        assert received == (window - 1) * (1 if rank in (0, cp - 1) else 2)
