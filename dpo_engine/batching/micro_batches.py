"""Build a data-parallel rank's micro-batches from a global batch, and choose their layout."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpo_engine.batching.batches import DUMMY_LENGTH, Batch, collate
from dpo_engine.batching.blocks import padded_length
from dpo_engine.batching.packing import CostModel, deal_trees, make_trees, plan_digest
from dpo_engine.batching.plan import deal
from dpo_engine.batching.trees import needed_columns, plant
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset, part_digests
from dpo_engine.platform.dims import ParallelDims

PLANNED_TOGETHER = 512
"""Maximum number of pairs that are planned together. A larger global batch is planned in several parts."""

WORTH_IT = 1.05
"""``auto`` chooses ``tree`` if ``stacked`` would compute at least `WORTH_IT` times as many tokens as ``tree``.

Exception: if trees are slow on this device, ``auto`` always chooses ``stacked`` (:func:`choose_layout`).

The log recommends ``data.group_by_prompt`` if this option could reduce the number of tokens in ``tree`` by a factor of
at least `WORTH_IT`.
"""


def choose_layout(config: Config, pairs: PairDataset, *, slow_trees: bool) -> tuple[str, str]:
    """Choose ``stacked`` or ``tree`` according to ``batch.layout``. Return the layout and a reason to log.

    ``auto`` compares the number of tokens that each layout would compute. In ``stacked``, padding is counted, and each
    prompt is counted twice per pair, once for each response. In ``tree``, each prompt is counted once per pair, or
    twice if responses do not share their prompts.

    config      must give the size of micro-batches as a number, not as ``auto``
    slow_trees  whether the backend for attention in trees needs hundreds of small calls on this device, as ``sdpa``
                does on a GPU; ``auto`` then chooses ``stacked``
    """
    if config.batch.layout != "auto":
        return config.batch.layout, "as configured"
    prompt, chosen, rejected = (column.astype(np.int64) for column in pairs.lengths.T)
    rows = np.sort(prompt + np.maximum(chosen, rejected))[::-1]
    sizes = _group(rows, config, multiple=1)
    starts = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])
    stacked = 2 * int((rows[starts] * np.minimum(sizes, len(rows) - starts)).sum())
    pair = int((prompt + chosen + rejected).sum())
    gain = stacked / int(pair_tokens(pairs, config, "tree").sum())
    found = (
        f"stacked computes {gain:.2f}x as many tokens as tree, and prompts are {prompt.sum() / pair:.0%} of a pair's "
        "tokens"
    )
    _, first = np.unique(pairs.prompt_keys, return_index=True)
    together = pair / (pair - int(prompt.sum()) + int(prompt[first].sum()))
    if together >= WORTH_IT and config.shares_prompts and not config.data.group_by_prompt:
        found += (
            "; pairs share prompts; data.group_by_prompt=true may reduce tree's token count further, by a factor of up "
            f"to {together:.2f}"
        )
    if slow_trees:
        return "stacked", f"{found}; trees are slow on a GPU with this attention backend; see model.attention"
    return ("tree" if gain >= WORTH_IT else "stacked"), found


def is_settled(config: Config) -> bool:
    """Return whether the configuration gives the layout and the size of micro-batches, so that no choice is needed."""
    sized = config.train.micro_batch_size is not None or config.batch.tokens_per_micro_batch != "auto"
    return sized and config.batch.layout != "auto"


def pair_tokens(pairs: PairDataset, config: Config, layout: str) -> np.ndarray:
    """Return the number of tokens of each pair in a layout, [n]. Padding to the length of another pair is not counted.

    In ``tree``, each pair is assumed to share nothing with other pairs.
    """
    prompt, chosen, rejected = (column.astype(np.int64) for column in pairs.lengths.T)
    if layout == "stacked":
        return 2 * (prompt + np.maximum(chosen, rejected))
    return (1 if config.shares_prompts else 2) * prompt + chosen + rejected


def visible_share(config: Config, pairs: PairDataset, dp_size: int) -> float:
    """Estimate the attention density in rows of trees: the fraction of (query, key) pairs that are visible.

    The number of tokens in a row is estimated as the smaller of two numbers: the token budget, and the number of tokens
    that a data-parallel rank gets from an average global batch. A pair that is longer than this number is assumed to be
    alone in its row. The estimate ignores that different pairs may share prompts and responses.
    """
    prompt, chosen, rejected = (column.astype(np.float64) for column in pairs.lengths.T)
    with_chosen, alone = prompt + chosen, rejected + (0 if config.shares_prompts else prompt)
    seen = with_chosen * (with_chosen + 1) / 2 + alone * (alone + 1) / 2
    seen += prompt * rejected if config.shares_prompts else 0
    tokens = pair_tokens(pairs, config, "tree")
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
    """Build a rank's micro-batches in layout ``stacked``.

    Pairs of similar length are in the same micro-batch, and the longest pairs come first. Rows are padded to the
    longest row in their micro-batch, rounded up as the parallel layout and FP8 require. A micro-batch has
    ``train.micro_batch_size`` pairs or, if that is null, as many as fit into ``batch.tokens_per_micro_batch``, and at
    least one. In an interleaved pipeline schedule, the stages do not exchange tensor shapes, so all micro-batches of a
    step have the same shape.
    """
    multiple = dims.sequence_multiple(sequence_parallel, config.megatron.token_multiple)
    places, length = _stacked_places(dataset, indices, config, dims, dp_rank, multiple)
    return [
        collate([dataset[i] if i >= 0 else None for i in place], place, pad_id=0, multiple=multiple, length=length)
        for place in places
    ]


def padded_rows(
    dataset: PairDataset, indices: np.ndarray, config: Config, dims: ParallelDims, sequence_parallel: bool
) -> np.ndarray:
    """Return the numbers of rows and columns of each micro-batch of each rank in layout ``stacked``, [k, 2]."""
    multiple = dims.sequence_multiple(sequence_parallel, config.megatron.token_multiple)
    places, length = _stacked_places(dataset, indices, config, dims, 0, multiple)
    sizes = np.array([len(place) for place in places])
    lengths = np.full((int(sizes.sum()), dims.dp), DUMMY_LENGTH)
    lengths.ravel()[: len(indices)] = -np.sort(-_row_lengths(dataset, indices))
    # Pairs are dealt in order of decreasing length, one to each rank in turn. The first pair of a micro-batch is
    # therefore its longest pair.
    longest = np.maximum(lengths[np.cumsum(sizes) - sizes].ravel(), length or DUMMY_LENGTH)
    return np.stack([2 * np.repeat(sizes, dims.dp), -(-longest // multiple) * multiple], axis=1)


def _row_lengths(dataset: PairDataset, indices: np.ndarray) -> np.ndarray:
    """Return the length of the longer row of each pair in layout ``stacked``, [n]."""
    prompt, chosen, rejected = dataset.lengths[indices].T
    return prompt + np.maximum(chosen, rejected)


def _stacked_places(
    dataset: PairDataset, indices: np.ndarray, config: Config, dims: ParallelDims, dp_rank: int, multiple: int
) -> tuple[list[np.ndarray], int | None]:
    """Return the pairs of a rank's micro-batches, and the minimum number of columns of a micro-batch.

    With an interleaved pipeline schedule, all rows must have the same length. The minimum is then the length of the
    longest row of all ranks. With other schedules, the minimum is None.

    multiple  number that must divide the length of a row
    """
    lengths = _row_lengths(dataset, indices)
    order = np.argsort(-lengths, kind="stable")
    own = lengths[order[:: dims.dp]]  # the first rank's pairs; no rank has a longer pair at the same index
    if dims.vpp:
        size = _pairs_that_fit(own[0], config, multiple)
        sizes = [size] * (-(-len(own) // (size * dims.pp)) * dims.pp)
    else:
        sizes = _group(own, config, multiple)
    return deal(indices[order], dp_rank=dp_rank, dp_size=dims.dp, sizes=sizes), int(own[0]) if dims.vpp else None


def _group(lengths: np.ndarray, config: Config, multiple: int) -> list[int]:
    """Return the number of pairs in each stacked micro-batch of a rank.

    lengths   [n]  row length of each of the rank's pairs, in descending order
    multiple  number that must divide the length of a row
    """
    sizes: list[int] = []
    at = 0
    while at < len(lengths):
        sizes.append(_pairs_that_fit(lengths[at], config, multiple))
        at += sizes[-1]
    if config.train.micro_batch_size is None:
        sizes[-1] -= at - len(lengths)
    return sizes


def _pairs_that_fit(length: int, config: Config, multiple: int) -> int:
    """Return the number of pairs, at least 1, in a stacked micro-batch whose longest row has `length` tokens."""
    if config.train.micro_batch_size is not None:
        return config.train.micro_batch_size
    return max(config.batch.tokens_per_micro_batch // (2 * -(-int(length) // multiple) * multiple), 1)


def tree_batches(
    dataset: PairDataset,
    indices: np.ndarray,
    config: Config,
    dims: ParallelDims,
    dp_rank: int,
    sequence_parallel: bool,
    cost: CostModel,
    row_tokens: int | None = None,
) -> list[Batch]:
    """Build a rank's micro-batches in layout ``tree``, with balanced costs and within the token budget.

    See :func:`~dpo_engine.batching.packing.deal_trees`. In an interleaved pipeline schedule, the stages do not exchange
    tensor shapes, so all rows of a step are padded to the longest row.

    row_tokens  number of tokens to which every row is padded (:func:`fixed_row`); this number is then also the token
                budget. None: rows are not padded to a fixed number of tokens

    Raises `RuntimeError` if a row is longer than ``row_tokens``.
    """
    share, multiple = config.shares_prompts, dims.share_multiple(sequence_parallel, config.megatron.token_multiple)
    plans = [
        deal_trees(
            part,
            dataset.lengths[part],
            part_digests(dataset, part),
            cost=cost,
            dp_size=dims.dp,
            tokens_per_micro_batch=row_tokens or token_budget(dataset, config),
            share=share,
            multiple=dims.pp if dims.vpp else 1,
        )
        for part in np.array_split(indices, -(-len(indices) // PLANNED_TOGETHER))
    ]
    ranks = [[place for plan in plans for place in plan[rank]] for rank in range(dims.dp)]
    length = row_tokens
    if dims.vpp or row_tokens:
        longest = max(_row_tokens(dataset, place, share) for rank in ranks for place in rank)
        if row_tokens and longest > row_tokens:
            raise RuntimeError(
                f"a row of trees has {longest:,} tokens, but rows have a fixed size of {row_tokens:,}; call "
                "Engine.settle_batches with all pairs that the run scores"
            )
        length = row_tokens or longest
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


def share_batches(
    dataset: PairDataset,
    indices: np.ndarray,
    config: Config,
    dims: ParallelDims,
    dp_rank: int,
    cp_rank: int,
    sequence_parallel: bool,
    cost: CostModel,
    row_tokens: int | None = None,
) -> list[Batch]:
    """Build a rank's micro-batches in the configured layout, with only the columns of its context-parallel share.

    cost, row_tokens   as for :func:`tree_batches`; not used in layout ``stacked``
    """
    asked = (dataset, indices, config, dims, dp_rank, sequence_parallel)
    tree = config.batch.layout == "tree"
    made = tree_batches(*asked, cost, row_tokens) if tree else stacked_batches(*asked)
    shares = [batch.shard(cp_rank, dims.cp) for batch in made]
    if tree:
        multiple = dims.share_multiple(sequence_parallel, config.megatron.token_multiple)
        shares = [replace(share, columns=needed_columns(share, multiple)) for share in shares]
    return shares


def tree_plan(config: Config, pairs: PairDataset, cost: CostModel, row_tokens: int | None = None) -> str:
    """Return an identifier of the data and settings that determine how trees are assigned to micro-batches.

    The assignment also depends on the numbers of ranks and of pipeline stages. These numbers affect the identifier only
    through ``row_tokens``, the fixed size of rows.
    """
    settings = {
        "seed": config.data.seed,
        "shuffle": config.data.shuffle,
        "weights": [source.weight for source in config.data.train],
        "group_by_prompt": config.data.group_by_prompt,
        "global_batch_size": config.train.global_batch_size,
        "tokens_per_micro_batch": row_tokens or token_budget(pairs, config),
        "share": config.shares_prompts,
    }
    return plan_digest(pairs.digest, cost, **settings)


def token_budget(dataset: PairDataset, config: Config) -> int:
    """Return the maximum number of tokens in a micro-batch of trees.

    This is ``batch.tokens_per_micro_batch``. If that is ``auto``, the maximum is the total number of tokens of the N
    longest pairs, where N is ``train.micro_batch_size``.
    """
    if config.batch.tokens_per_micro_batch != "auto":
        return config.batch.tokens_per_micro_batch
    return int(np.sort(pair_tokens(dataset, config, "tree"))[-config.train.micro_batch_size :].sum())


def fixed_rows(
    config: Config, dims: ParallelDims, sequence_parallel: bool, train: PairDataset, others: Sequence[PairDataset]
) -> tuple[int | None, list[str]]:
    """Return the fixed number of tokens per row and a line for the log, or None and no line if row lengths can vary.

    train, others   as for :func:`fixed_row`
    """
    if (why := config.fixed_row_reason) is None:
        return None, []
    tokens = fixed_row(config, dims, sequence_parallel, train, others)
    return tokens, [f"rows: all padded to {tokens:,} tokens, {why}"]


def fixed_row(
    config: Config, dims: ParallelDims, sequence_parallel: bool, train: PairDataset, others: Sequence[PairDataset]
) -> int:
    """Return the number of tokens per row of trees, for a run in which all rows must have the same size.

    The number is the token budget, or the length of the longest pair if that is greater. It is rounded up as the
    parallel layout and FP8 require.

    train   the pairs that determine the token budget
    others  further pairs that the run scores
    """
    longest = [int(pair_tokens(pairs, config, "tree").max()) for pairs in (train, *others) if len(pairs)]
    multiple = dims.share_multiple(sequence_parallel, config.megatron.token_multiple)
    return padded_length(max(token_budget(train, config), *longest), dims.cp, multiple)


def _row_tokens(dataset: PairDataset, place: np.ndarray, share: bool) -> int:
    trees = make_trees(dataset.lengths[place], part_digests(dataset, place), share=share) if len(place) else []
    return sum(tree.tokens for tree in trees)


def _equal_places(ranks: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Add dummies (-1) so that all ranks have the same number of entries, and every micro-batch has at least one entry.

    An entry is a pair or a dummy; dummies have no tokens. When per-pair values are gathered, all ranks must contribute
    the same number of values.
    """
    filled = [[place if len(place) else np.array([-1]) for place in rank] for rank in ranks]
    most = max(sum(map(len, rank)) for rank in filled)
    for rank in filled:
        rank[-1] = np.append(rank[-1], np.full(most - sum(map(len, rank)), -1))
    return filled
