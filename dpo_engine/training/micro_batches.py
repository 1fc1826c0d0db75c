"""A global batch as one data-parallel rank's micro-batches, in the layout that suits the pairs."""

import numpy as np

from dpo_engine.config import Config
from dpo_engine.data.batches import Batch, collate
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.plan import deal
from dpo_engine.data.trees import plant
from dpo_engine.platform.parallel import ParallelDims

WORTH_IT = 1.05
"""Times fewer tokens that trees must save before ``auto`` takes them."""


def choose_layout(config: Config, pairs: PairDataset, *, gpu: bool) -> tuple[str, str]:
    """``stacked`` or ``tree`` for ``batch.layout``, and why.

    Tokens are counted as both layouts would run the pairs at ``train.micro_batch_size``: padding and repeated prompts
    on one side, each prompt once per pair on the other.
    """
    if config.batch.layout != "auto":
        return config.batch.layout, "as asked"
    prompt, chosen, rejected = (column.astype(np.int64) for column in pairs.lengths.T)
    rows = np.sort(prompt + np.maximum(chosen, rejected))[::-1]
    size = config.train.micro_batch_size
    stacked = sum(2 * int(rows[at]) * len(rows[at : at + size]) for at in range(0, len(rows), size))
    tree = int((prompt + chosen + rejected).sum())
    gain = stacked / tree
    found = f"{prompt.sum() / tree:.0%} of a pair's tokens are its prompt, and trees run {gain:.2f} times fewer tokens"
    if gpu:
        return "stacked", f"{found}; batch.layout=tree takes them, which no GPU has been measured with yet"
    return ("tree" if gain >= WORTH_IT else "stacked"), found


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
) -> list[Batch]:
    """Rows of trees without padding between them, within the budget of tokens.

    An interleaved schedule exchanges no shapes, so there all rows of the step are as long as the longest.
    """
    tokens = dataset.lengths[indices].sum(1)
    budget = config.batch.tokens_per_micro_batch or int(
        np.sort(dataset.lengths.sum(1))[-config.train.micro_batch_size :].sum()
    )
    order = indices[np.argsort(-tokens, kind="stable")]
    shares = [order[rank :: dims.dp] for rank in range(dims.dp)]
    packed = [_pack(dataset, share, budget) for share in shares]
    count = max(map(len, packed))
    if dims.vpp:
        count = -(-count // dims.pp) * dims.pp
    packed = [part + [np.array([-1])] * (count - len(part)) for part in packed]
    multiple = dims.tp if sequence_parallel else 1
    length = (
        max(int(dataset.lengths[place[place >= 0]].sum()) for part in packed for place in part) if dims.vpp else None
    )
    # Every data-parallel rank has as many places for pairs: those that it has no pair for cost nothing.
    places = max(sum(map(len, part)) for part in packed)
    mine = packed[dp_rank]
    mine[-1] = np.append(mine[-1], np.full(places - sum(map(len, mine)), -1))
    return [
        plant(
            [dataset[i] if i >= 0 else None for i in place],
            place,
            pad_id=0,
            share=config.batch.share,
            cp_size=dims.cp,
            multiple=multiple,
            length=length,
        )
        for place in mine
    ]


def _pack(dataset, indices, budget):
    bins = []
    for i in indices:
        size = int(dataset.lengths[i].sum())
        for bin in bins:
            if bin[0] + size <= budget:
                bin[0] += size
                bin[1].append(i)
                break
        else:
            bins.append([size, [i]])
    return [np.array(b[1]) for b in bins]
