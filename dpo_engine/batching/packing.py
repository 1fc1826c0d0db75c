"""Pairs of a global batch to trees, data-parallel ranks and micro-batches, by what they cost. Pure functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from dpo_engine.batching.balance import deal_evenly

VERSION = 1
"""Of the rules by which pairs are dealt: to be raised with every change after which a batch is dealt otherwise."""


@dataclass(frozen=True)
class CostModel:
    """FLOP of a forward pass: a sum of three terms, each a coefficient times a count.

    A backward pass is twice the same in every term, so the ratios between micro-batches are those of training.

    token    per token of a row: 2 x parameters of the layers' matrices
    visible  per (query, key) pair that attention sees: 4 x layers x query heads x head size
    scored   per token that is scored: 2 x hidden size x vocabulary, of the output layer
    """

    token: int
    visible: int
    scored: int

    @classmethod
    def of_decoder(
        cls,
        *,
        matrix_parameters: int,
        num_layers: int,
        num_attention_heads: int,
        head_dim: int,
        hidden_size: int,
        vocab_size: int,
    ) -> CostModel:
        """That of a dense decoder, from the facts of the same names in its architecture.

        matrix_parameters  of the layers' linears and the output layer together
        """
        head = hidden_size * vocab_size
        return cls(2 * (matrix_parameters - head), 4 * num_layers * num_attention_heads * head_dim, 2 * head)

    def flops(self, tree: Tree) -> int:
        """What one tree costs."""
        return self.token * tree.tokens + self.visible * tree.visible + self.scored * tree.scored


@dataclass
class Tree:
    """Pairs of one prompt in one row: the prompt, then each distinct response once. What ranks are dealt.

    prompt     tokens of the prompt
    copies     of the prompt in the row: 1, or 2 for a pair that is not shared
    pairs      their places in the global batch
    responses  tokens of each distinct response, by content
    """

    prompt: int
    copies: int = 1
    pairs: list[int] = field(default_factory=list)
    responses: dict[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.copies * self.prompt + self.scored

    @property
    def scored(self) -> int:
        """Tokens with a log-probability: those of the responses."""
        return sum(self.responses.values())

    @property
    def visible(self) -> int:
        """(query, key) pairs: every token sees itself and all before it in the prompt and in its own response."""
        inside = [r * (r + 1) // 2 + r * self.prompt for r in self.responses.values()]
        return self.copies * self.prompt * (self.prompt + 1) // 2 + sum(inside)


def make_trees(lengths: np.ndarray, parts: np.ndarray, *, share: bool = True) -> list[Tree]:
    """The pairs of a global batch as trees, one for each prompt, in the order of their first pairs.

    lengths  [n, 3]  tokens of prompt, chosen, rejected
    parts    [n, 3]  int64, a hash of each; equal hashes are taken for equal contents
    share            without it every pair is two plain sequences: a tree by itself whose prompt counts twice
    """
    trees: dict[int, Tree] = {}
    for pair, (sizes, keys) in enumerate(zip(lengths.tolist(), parts.tolist(), strict=True)):
        if share:
            tree = trees.setdefault(keys[0], Tree(sizes[0]))
            tree.responses |= {keys[1]: sizes[1], keys[2]: sizes[2]}
        else:
            tree = trees[pair] = Tree(sizes[0], copies=2, responses=dict(enumerate(sizes[1:])))
        tree.pairs.append(pair)
    return list(trees.values())


def _cut(tree: Tree, lengths: np.ndarray, parts: np.ndarray, budget: int) -> list[Tree]:
    """The tree in pieces within the budget, of one pair at least; pairs with equal responses stay near each other."""
    if tree.tokens <= budget or len(tree.pairs) == 1:
        return [tree]
    pieces: list[Tree] = []
    for pair in sorted(tree.pairs, key=lambda pair: (*parts[pair].tolist(), pair)):
        own = {int(parts[pair, k]): int(lengths[pair, k]) for k in (1, 2)}
        if pieces:
            last = pieces[-1]
            grown = Tree(tree.prompt, pairs=[*last.pairs, pair], responses=last.responses | own)
            if grown.tokens <= budget:
                pieces[-1] = grown
                continue
        pieces.append(Tree(tree.prompt, pairs=[pair], responses=own))
    return pieces


def deal_trees(
    indices: np.ndarray,
    lengths: np.ndarray,
    parts: np.ndarray,
    *,
    cost: CostModel,
    dp_size: int,
    tokens_per_micro_batch: int,
    share: bool = True,
    multiple: int = 1,
) -> list[list[np.ndarray]]:
    """The micro-batches that every data-parallel rank takes of a global batch, each pair once.

    1. Pairs of one prompt make a tree (:func:`make_trees`). One that alone exceeds the budget is cut between pairs.
    2. Trees go to ranks so that costs are even (:func:`~dpo_engine.batching.balance.deal_evenly`).
    3. The trees of a rank go to micro-batches within the budget, again so that costs are even. A pair that exceeds the
       budget is a micro-batch by itself. All ranks have the same number of micro-batches: the least for which a place
       is found for every tree on every rank. A rank with fewer trees has empty ones.
    4. A rank's cheap micro-batches come first and last and the dearest in the middle: while a pipeline fills and
       drains, its stages wait for one micro-batch.

    indices   [n]  pairs of the global batch
    lengths   [n, 3]  tokens of prompt, chosen, rejected
    parts     [n, 3]  int64, a hash of each (:func:`~dpo_engine.data.dataset.part_digests`)
    tokens_per_micro_batch  the budget, in tokens of trees
    share     whether a prompt, and a response, that occurs again is held once
    multiple  the number of micro-batches must be divisible by this (pipeline stages, when interleaved)

    Returns  for each rank its micro-batches, arrays of pairs [b] int64, b >= 0; pairs of one tree stand together
    """
    indices, budget = np.asarray(indices, dtype=np.int64), tokens_per_micro_batch
    trees = make_trees(lengths, parts, share=share)
    trees = [piece for tree in trees for piece in _cut(tree, lengths, parts, budget)]
    costs = [cost.flops(tree) for tree in trees]
    ranks = deal_evenly(costs, dp_size)
    # Above the budget a tree fills a micro-batch: nothing else finds room beside it.
    sizes = np.array([min(tree.tokens, budget) for tree in trees], dtype=np.int64)
    own = [np.flatnonzero(ranks == rank) for rank in range(dp_size)]
    dealt = _micro_batches(costs, sizes, own, budget, multiple)
    return [[indices[[pair for tree in places for pair in trees[tree].pairs]] for places in rank] for rank in dealt]


def _micro_batches(
    costs: Sequence[int], sizes: np.ndarray, own: Sequence[np.ndarray], budget: int, multiple: int
) -> list[list[np.ndarray]]:
    """The trees of each rank as the same number of micro-batches, in their order."""
    count = -(-max(-(-int(sizes[trees].sum()) // budget) for trees in own) // multiple) * multiple
    while True:
        dealt = []
        for trees in own:
            bins = deal_evenly([costs[tree] for tree in trees], count, sizes=sizes[trees], capacity=budget)
            if bins is None:
                break
            dealt.append(_small_ends([trees[bins == k] for k in range(count)], costs))
        else:
            return dealt
        count += multiple


def _small_ends(micro_batches: list[np.ndarray], costs: Sequence[int]) -> list[np.ndarray]:
    """The same, the cheapest first and last and the dearest in the middle."""
    rising = sorted(micro_batches, key=lambda trees: sum(costs[tree] for tree in trees))
    return rising[::2] + rising[1::2][::-1]


def plan_digest(data_digest: str, cost: CostModel, **settings: int | bool | Sequence[float]) -> str:
    """A name for a run's plan: equal exactly when everything that decides it is.

    data_digest  of the pairs in their order
    settings     arguments of :func:`deal_trees` and of :class:`~dpo_engine.batching.plan.Plan`
    """
    facts = {"version": VERSION, "data": data_digest, "cost": asdict(cost), "settings": settings}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
