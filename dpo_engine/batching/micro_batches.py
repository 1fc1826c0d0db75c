"""A global batch as one data-parallel rank's micro-batches, in the layout that suits the pairs."""

import numpy as np

from dpo_engine.batching.batches import Batch, collate
from dpo_engine.batching.packing import CostModel, deal_trees, make_trees, plan_digest
from dpo_engine.batching.plan import deal
from dpo_engine.batching.trees import plant
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset, part_digests
from dpo_engine.platform.parallel import ParallelDims

PLANNED_TOGETHER = 512
"""Pairs whose micro-batches are planned at once, at most: an evaluation may have any number."""

WORTH_IT = 1.05
"""Times fewer tokens that trees must save before ``auto`` takes them."""


def choose_layout(config: Config, pairs: PairDataset, *, gpu: bool) -> tuple[str, str]:
    """``stacked`` or ``tree`` for ``batch.layout``, and why.

    Tokens are counted as both layouts would run the pairs at ``train.micro_batch_size``: padding and repeated prompts
    on one side, each prompt once per pair, or twice without ``batch.share``, on the other.
    """
    if config.batch.layout != "auto":
        return config.batch.layout, "as asked"
    prompt, chosen, rejected = (column.astype(np.int64) for column in pairs.lengths.T)
    rows = np.sort(prompt + np.maximum(chosen, rejected))[::-1]
    size = config.train.micro_batch_size
    stacked = sum(2 * int(rows[at]) * len(rows[at : at + size]) for at in range(0, len(rows), size))
    pair = int((prompt + chosen + rejected).sum())
    gain = stacked / int(_tree_tokens(pairs, config).sum())
    found = f"{prompt.sum() / pair:.0%} of a pair's tokens are its prompt, and trees run {gain:.2f} times fewer tokens"
    _, first = np.unique(pairs.prompt_keys, return_index=True)
    together = pair / (pair - int(prompt.sum()) + int(prompt[first].sum()))
    if together >= WORTH_IT and config.batch.share and not config.data.group_by_prompt:
        found += f" (data.group_by_prompt=true up to {together:.2f} times fewer again: pairs share prompts)"
    if gpu:
        return "stacked", f"{found}; batch.layout=tree takes them, which no GPU has been measured with yet"
    return ("tree" if gain >= WORTH_IT else "stacked"), found


def visible_share(config: Config, pairs: PairDataset, dp_size: int) -> float:
    """Part of a row's scores that are of a query and a key which see each other, in rows of trees as full as they get.

    A row has the budget's tokens, or a data-parallel rank's part of an average global batch where that is less. What
    pairs share between them is left aside.
    """
    prompt, chosen, rejected = (column.astype(np.float64) for column in pairs.lengths.T)
    with_chosen, alone = prompt + chosen, rejected + (0 if config.batch.share else prompt)
    seen = with_chosen * (with_chosen + 1) / 2 + alone * (alone + 1) / 2
    seen += prompt * rejected if config.batch.share else 0
    tokens = _tree_tokens(pairs, config)
    together = min(config.train.global_batch_size / dp_size, len(tokens))
    row = min(token_budget(pairs, config), together * tokens.mean())
    return float(seen.sum() / (tokens * np.maximum(tokens, row)).sum())


def stacked_batches(
    dataset: PairDataset,
    indices: np.ndarray,
    config: Config,
    dims: ParallelDims,
    dp_rank: int,
    sequence_parallel: bool,
) -> list[Batch]:
    """Padded rows of whole pairs; those of like length share a micro-batch, the longest first.

    Rows are padded to the longest of their micro-batch, rounded up to what the layout needs. An interleaved schedule
    exchanges no shapes, so there all micro-batches of the step get one length.
    """
    prompt, chosen, rejected = dataset.lengths[indices].T
    lengths = prompt + np.maximum(chosen, rejected)
    places = deal(
        indices[np.argsort(-lengths, kind="stable")],
        dp_rank=dp_rank,
        dp_size=dims.dp,
        micro_batch_size=config.train.micro_batch_size,
        multiple=dims.pp if dims.vpp else 1,
    )
    length = int(lengths.max()) if dims.vpp else None
    multiple = dims.sequence_multiple(sequence_parallel)
    return [
        collate([dataset[i] if i >= 0 else None for i in place], place, pad_id=0, multiple=multiple, length=length)
        for place in places
    ]


def tree_batches(
    dataset: PairDataset,
    indices: np.ndarray,
    config: Config,
    dims: ParallelDims,
    dp_rank: int,
    sequence_parallel: bool,
    cost: CostModel,
) -> list[Batch]:
    """Rows of trees without padding between them, planned by what they cost within the budget of tokens.

    An interleaved schedule exchanges no shapes, so there all rows of the step are as long as the longest.
    """
    share, multiple = config.batch.share, dims.tp if sequence_parallel else 1
    plans = [
        deal_trees(
            part,
            dataset.lengths[part],
            part_digests(dataset, part),
            cost=cost,
            dp_size=dims.dp,
            tokens_per_micro_batch=token_budget(dataset, config),
            share=share,
            multiple=dims.pp if dims.vpp else 1,
        )
        for part in np.array_split(indices, -(-len(indices) // PLANNED_TOGETHER))
    ]
    ranks = [[place for plan in plans for place in plan[rank]] for rank in range(dims.dp)]
    length = max(_row_tokens(dataset, place, share) for rank in ranks for place in rank) if dims.vpp else None
    return [
        plant(
            [dataset[i] if i >= 0 else None for i in place],
            place,
            pad_id=0,
            share=share,
            cp_size=dims.cp,
            multiple=multiple,
            length=length,
        )
        for place in _equal_places(ranks)[dp_rank]
    ]


def tree_plan(config: Config, pairs: PairDataset, cost: CostModel) -> str:
    """A name for how the run's trees are dealt on a given number of ranks: equal for runs that deal them alike."""
    settings = {
        "seed": config.data.seed,
        "shuffle": config.data.shuffle,
        "weights": [source.weight for source in config.data.train],
        "group_by_prompt": config.data.group_by_prompt,
        "global_batch_size": config.train.global_batch_size,
        "tokens_per_micro_batch": token_budget(pairs, config),
        "share": config.batch.share,
    }
    return plan_digest(pairs.digest, cost, **settings)


def token_budget(dataset: PairDataset, config: Config) -> int:
    """Tokens of a micro-batch of trees: as asked, or what ``train.micro_batch_size`` of the longest pairs have."""
    if config.batch.tokens_per_micro_batch is not None:
        return config.batch.tokens_per_micro_batch
    return int(np.sort(_tree_tokens(dataset, config))[-config.train.micro_batch_size :].sum())


def _tree_tokens(dataset: PairDataset, config: Config) -> np.ndarray:
    """Tokens of each pair in a row of trees [n], where it shares nothing with other pairs."""
    return dataset.lengths.astype(np.int64) @ [1 if config.batch.share else 2, 1, 1]


def _row_tokens(dataset: PairDataset, place: np.ndarray, share: bool) -> int:
    trees = make_trees(dataset.lengths[place], part_digests(dataset, place), share=share) if len(place) else []
    return sum(tree.tokens for tree in trees)


def _equal_places(ranks: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """The micro-batches of every rank with dummies, -1, so that ranks have as many places for pairs; they cost nothing.

    What ranks gather by pair has equal parts then. Each micro-batch has a place at least.
    """
    filled = [[place if len(place) else np.array([-1]) for place in rank] for rank in ranks]
    most = max(sum(map(len, rank)) for rank in filled)
    for rank in filled:
        rank[-1] = np.append(rank[-1], np.full(most - sum(map(len, rank)), -1))
    return filled
