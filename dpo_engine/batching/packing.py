"""Plan layout `tree`: assign the pairs of a global batch to trees, data-parallel ranks, and micro-batches.

Problem. An optimizer step ends when its slowest rank has finished. In layout `tree`, the costs of pairs differ widely:
pairs with the same prompt share its tokens, and the cost of attention grows with the square of the length. The
available memory limits the number of tokens in a micro-batch, not the number of pairs. In addition, all ranks must run
the same number of micro-batches, because they follow the same pipeline schedule.

Solution. Group pairs with the same prompt into trees, and split trees that exceed the token budget. Assign the trees
first to ranks and then to micro-batches, in both cases so that the estimated costs are even (:func:`deal_trees`). The
cost is the FLOP count of a forward pass: a weighted sum of the numbers of tokens, visible (query, key) pairs, and
scored tokens (:class:`CostModel`).

Why this way. Each global batch is planned separately, so the layout and the number of ranks do not change which pairs
an optimizer step uses. The plan is a deterministic function of lengths and content hashes, computed in integers. Every
rank therefore computes the same plan without communication, and :func:`plan_digest` can identify it. The algorithm
(:func:`~dpo_engine.batching.balance.deal_evenly`) is greedy assignment followed by exchanges. It is fast. It stops
when costs are even to 0.1%, when no further exchange helps, or after as many exchanges as there are items.

Not covered. FLOP counts are not durations: the plan ignores communication, the efficiency of kernels, the padding of
interleaved schedules, and the uneven load of experts. If a tree is split, every piece computes the prompt again. A pair
that is longer than the budget is not truncated, but becomes a micro-batch that exceeds the budget. Context-parallel
ranks are balanced elsewhere (:mod:`~dpo_engine.batching.shares`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dpo_engine.batching.balance import deal_evenly

VERSION = 1
"""Version of the planning rules. Increment this number if a change of the code gives any batch a different plan."""


@dataclass(frozen=True)
class CostModel:
    """FLOP count of a forward pass: a sum of terms, each of which is a coefficient times a count.

    In a backward pass, every term is twice as large, so the ratios between micro-batches also hold for training.

    token    FLOP per token in a row: 2 x number of matrix parameters that a token uses in the layers. In a mixture of
             experts, these include the parameters of only the few experts that process the token
    visible  FLOP per visible (query, key) pair in all layers without a sliding window: 4 x number of these layers x
             query heads x head size
    scored   FLOP per scored token, in the output layer: 2 x hidden size x vocabulary size
    windows  for layers with a sliding window: each window size, and the FLOP per visible (query, key) pair in all
             layers with this window size
    """

    token: int
    visible: int
    scored: int
    windows: tuple[tuple[int, int], ...] = ()

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
        windows: Sequence[int] = (),
    ) -> CostModel:
        """Return the cost model for a decoder.

        matrix_parameters  number of matrix parameters that a token uses, in the layers and in the output layer
        windows            sliding windows that are shorter than some rows, one entry for each layer with such a window

        Each of the other arguments is the attribute of :class:`~dpo_engine.model.architecture.Architecture` with the
        same name.
        """
        head, pair = hidden_size * vocab_size, 4 * num_attention_heads * head_dim
        near = tuple((window, pair * count) for window, count in sorted(Counter(windows).items()))
        return cls(2 * (matrix_parameters - head), pair * (num_layers - len(windows)), 2 * head, near)

    def flops(self, tree: Tree) -> int:
        """Return the cost of one tree."""
        near = sum(pair * tree.within(window) for window, pair in self.windows)
        return self.token * tree.tokens + self.visible * tree.visible + near + self.scored * tree.scored


def visible_pairs(length: Any, window: int | None = None) -> Any:
    """Return the number of visible (query, key) pairs in a causal row.

    length   number of tokens; for an array, the result is an array too
    window   maximum number of keys that a query sees, including its own key; None means no limit
    """
    near = length if window is None else np.minimum(length, window)
    return near * (near + 1) // 2 + (0 if window is None else (length - near) * window)


@dataclass
class Tree:
    """Pairs with the same prompt in one row: the prompt, then each distinct response once.

    Trees are assigned to ranks and micro-batches as a whole.

    prompt     number of tokens in the prompt
    copies     number of copies of the prompt in the row: 1 if responses share their prompts, otherwise 2
    pairs      indices of the pairs in the global batch
    responses  number of tokens in each distinct response. The key is the response's hash if responses are shared,
               otherwise 0 (chosen) or 1 (rejected)
    """

    prompt: int
    copies: int = 1
    pairs: list[int] = field(default_factory=list)
    responses: dict[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens that the tree adds to a row."""
        return self.copies * self.prompt + self.scored

    @property
    def scored(self) -> int:
        """Number of tokens in the responses. All of them count as scored, even if the scoring mask excludes some."""
        return sum(self.responses.values())

    @property
    def visible(self) -> int:
        """Number of visible (query, key) pairs in a layer without a sliding window.

        A token sees itself and the earlier tokens of its prompt and response.
        """
        return self.within(None)

    def within(self, window: int | None) -> int:
        """Return the number of visible (query, key) pairs in a layer with this sliding window (None: no window)."""
        prompt = int(visible_pairs(self.prompt, window))
        inside = [int(visible_pairs(self.prompt + r, window)) - prompt for r in self.responses.values()]
        return self.copies * prompt + sum(inside)


def make_trees(lengths: np.ndarray, parts: np.ndarray, *, share: bool = True) -> list[Tree]:
    """Group the pairs of a global batch into trees, one per prompt, in the order of their first pairs.

    lengths  [n, 3]  number of tokens in the prompt, the chosen and the rejected response
    parts    [n, 3]  int64, hashes of the prompt, the chosen and the rejected response; equal hashes are assumed to mean
                     equal contents
    share            whether to share prompts and responses; if false, each pair is a separate tree that consists of two
                     plain sequences, so its prompt counts twice
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
    """Split a tree into pieces of whole pairs that fit into the budget. A pair that exceeds the budget is one piece.

    The pairs are first sorted by their responses, so that pairs with the same response are likely to be in the same
    piece.
    """
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
    """Assign the pairs of a global batch to data-parallel ranks and micro-batches. Each pair is assigned once.

    1. Group pairs with the same prompt into trees (:func:`make_trees`). If a tree exceeds the budget, split it into
       pieces of whole pairs.
    2. Assign trees to ranks so that costs are even (:func:`~dpo_engine.batching.balance.deal_evenly`).
    3. Assign the trees of each rank to micro-batches within the budget, again so that costs are even. A pair that
       exceeds the budget is alone in its micro-batch. All ranks get the same number of micro-batches: the smallest
       multiple of `multiple` with which the algorithm finds room for all trees on every rank. If a rank has few trees,
       some of its micro-batches may be empty.
    4. Order the micro-batches of a rank, with the cheapest ones first and last and the most expensive ones in the
       middle. While a pipeline fills and drains, most of its stages wait for a single micro-batch, which should
       therefore be cheap.

    indices   [n]     pairs in the global batch
    lengths   [n, 3]  number of tokens in the prompt, the chosen and the rejected response
    parts     [n, 3]  int64, hashes of the prompt, the chosen and the rejected response
                      (:func:`~dpo_engine.data.dataset.part_digests`)
    tokens_per_micro_batch  the budget
    share     whether pairs share their prompts and responses, so that a row contains each of them only once
    multiple  number that must divide the number of micro-batches: for an interleaved schedule, the number of pipeline
              stages; otherwise 1

    Returns  for each rank, its micro-batches: arrays of pairs [b] int64, b >= 0; pairs of one tree are adjacent
    """
    indices, budget = np.asarray(indices, dtype=np.int64), tokens_per_micro_batch
    trees = make_trees(lengths, parts, share=share)
    trees = [piece for tree in trees for piece in _cut(tree, lengths, parts, budget)]
    costs = [cost.flops(tree) for tree in trees]
    ranks = deal_evenly(costs, dp_size)
    # A tree above the budget counts as a full micro-batch, so that no other tree is added to its micro-batch.
    sizes = np.array([min(tree.tokens, budget) for tree in trees], dtype=np.int64)
    own = [np.flatnonzero(ranks == rank) for rank in range(dp_size)]
    dealt = _micro_batches(costs, sizes, own, budget, multiple)
    return [[indices[[pair for tree in places for pair in trees[tree].pairs]] for places in rank] for rank in dealt]


def _micro_batches(
    costs: Sequence[int], sizes: np.ndarray, own: Sequence[np.ndarray], budget: int, multiple: int
) -> list[list[np.ndarray]]:
    """Assign the trees of each rank to ordered micro-batches. All ranks get the same number of micro-batches."""
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
    """Order micro-batches: the cheapest first and last, and the most expensive in the middle."""
    rising = sorted(micro_batches, key=lambda trees: sum(costs[tree] for tree in trees))
    return rising[::2] + rising[1::2][::-1]


def plan_digest(data_digest: str, cost: CostModel, **settings: int | bool | Sequence[float]) -> str:
    """Return an identifier of a run's plan: a hash of the data, the cost model, `VERSION`, and the given settings.

    data_digest  digest of the data set's pairs, in order
    settings     arguments of :func:`deal_trees` and of :class:`~dpo_engine.batching.plan.Plan`
    """
    # Leave out an empty `windows`, so that models without windows keep the digests of older releases.
    costs = {name: value for name, value in asdict(cost).items() if value != ()}
    facts = {"version": VERSION, "data": data_digest, "cost": costs, "settings": settings}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
