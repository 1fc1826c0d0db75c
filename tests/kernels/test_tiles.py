"""Tests of Triton's tiles and of sdpa: attention must compute few scores of keys that the query does not see."""

import itertools

import numpy as np
import pytest
import torch
from test_tree_attention import SHARED, paths, tensors, with_grads
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels import Tree, sdpa
from dpo_kernels.tiles import Blocks, tile_map, tile_matrix


def random_tree(generator: np.random.Generator) -> Tree:
    """Make a random row of tokens that form one or more trees. The queries are a random subset of the tokens.

    The segments of a tree are in depth-first order, and the queries are in ascending order.
    """
    parents: list[int] = []
    for segment in range(int(generator.integers(1, 9))):
        ancestors, above = [-1], segment - 1
        while above >= 0:
            ancestors.append(above)
            above = parents[above]
        parents.append(int(generator.choice(ancestors)))
    tree = Tree.of(generator.integers(1, 60, len(parents)), parents)
    share = generator.choice([0.05, 0.5, 1.0])
    return tree.select(np.flatnonzero(generator.random(tree.n) < share))


def visible_pairs(tree: Tree) -> np.ndarray:
    """Return which keys each query sees, [n_q, n] bool: the keys on the path from the root to the query."""
    seen = np.zeros((tree.n, tree.n), dtype=bool)
    for path in paths(tree):
        for place, token in enumerate(path):
            seen[token, path[: place + 1]] = True
    return seen[tree.rows]


@pytest.mark.parametrize("seed", range(20))
def test_tile_is_visited_only_if_part_of_it_is_visible(seed):
    generator = np.random.default_rng(seed)
    tree = random_tree(generator)
    blocks = Blocks(int(generator.choice([4, 16])), int(generator.choice([8, 16])), 4, 1, 1)
    visible = visible_pairs(tree)
    assert tree.visible == visible.sum()
    seen, full, _, _ = tile_matrix(tree, blocks)
    for i, j in itertools.product(range(seen.shape[0]), range(seen.shape[1])):
        keys = slice(j * blocks.keys, (j + 1) * blocks.keys)
        tile = visible[i * blocks.queries : (i + 1) * blocks.queries, keys]
        assert seen[i, j] == tile.any(), (i, j)
        assert full[i, j] == (tile.all() and tile.shape[1] == blocks.keys), (i, j)
    tiles = tile_map(tree, blocks, torch.device("cpu"))
    for lists, expected in ((tiles.by_query, (seen, full)), (tiles.by_key, (seen.T, full.T))):
        assert sorted(lists.order.tolist()) == list(range(len(expected[0])))
        for block, (begin, partly, end) in enumerate(lists.bounds.tolist()):
            whole, partial = lists.tiles[begin:partly].tolist(), lists.tiles[partly:end].tolist()
            assert whole == np.flatnonzero(expected[1][block]).tolist()
            assert partial == np.flatnonzero(expected[0][block] & ~expected[1][block]).tolist()


class CountScores(TorchDispatchMode):
    """Count the (query, key) pairs that the fused CPU kernel computes. torch's own FLOP counter omits this kernel."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = self.largest_mask = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if "scaled_dot_product" in name:
            assert "flash_attention_for_cpu" in name, f"{name} would hold all scores in memory"
            back = name.endswith("backward")
            query, key = args[1:3] if back else args[:2]
            causal = args[7] if back else (args[4] if len(args) > 4 else False)
            rows, columns = query.shape[-2], key.shape[-2]
            assert not causal or rows == columns
            pairs = rows * (rows + 1) // 2 if causal else rows * columns
            mask = (kwargs or {}).get("attn_mask")
            self.largest_mask = max(self.largest_mask, 0 if mask is None else mask.numel())
            if back:
                self.backward += pairs
            else:
                self.forward += pairs
                self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", range(8))
def test_sdpa_computes_visible_scores_plus_half_a_tile_per_query(seed):
    tree = random_tree(np.random.default_rng(100 + seed))
    if not len(tree.rows):
        return
    inputs, grad = tensors(tree, 2, 1, 8, 8, torch.float32)
    with CountScores() as counted:
        with_grads(sdpa.tree_attention, inputs, grad, tree)
    assert counted.forward == counted.backward
    assert tree.visible <= counted.forward <= tree.visible + len(tree.rows) * (sdpa.TILE - 1) / 2


def test_sdpa_work_relative_to_the_visible_area():
    tree = Tree.of(*SHARED)
    inputs, grad = tensors(tree, 1, 1, 8, 8, torch.float32)
    with CountScores() as counted:
        with_grads(sdpa.tree_attention, inputs, grad, tree)
    assert counted.forward / tree.visible < 1.04
    assert counted.largest_mask <= sdpa.TILE * tree.n


@pytest.mark.parametrize(
    "pairs, expected",
    [
        # Trees that share a call have at most 64 tokens in total. With 10 tokens per tree, at most six trees can share
        # a call, so the 32 trees take six calls.
        ([(4, 3, 3)] * 32, 6),
        ([(30, 20, 14)] * 3, 3),  # exactly 64 tokens
        ([(30, 20, 15)] * 3, 6),  # 65 tokens: each tree takes one call for prompt and chosen, and one for rejected
        ([(4, 3, 3), (200, 20, 20), (4, 3, 3), (4, 3, 3)], 4),
    ],
)
def test_sdpa_batches_short_trees(pairs, expected):
    lengths = [length for pair in pairs for length in pair]
    tree = Tree.of(lengths, [parent for i in range(len(pairs)) for parent in (-1, 3 * i, 3 * i)])
    inputs, grad = tensors(tree, 1, 1, 8, 8, torch.float32)
    with CountScores() as counted:
        with_grads(sdpa.tree_attention, inputs, grad, tree)
    assert counted.calls == expected


def test_tiles_relative_to_the_visible_area():
    tree = Tree.of(*SHARED)
    seen, full, _, _ = tile_matrix(tree, Blocks(128, 64, 8, 3, 2))
    assert (
        seen.sum() * 128 * 64 / tree.visible < 1.35
    )  # blocks at the diagonal and at the ends of segments are only partly visible
    assert full.sum() / seen.sum() > 0.6
    doubled = Tree.of([2 * length for length in SHARED[0]], SHARED[1])
    seen, _, _, _ = tile_matrix(doubled, Blocks(128, 64, 8, 3, 2))
    assert seen.sum() * 128 * 64 / doubled.visible < 1.18
