"""Token pairs to tensors: one micro-batch of whole pairs, chosen rows first, then rejected rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_engine.data.dataset import TokenPair, digest_halves

IGNORED = -100
DUMMY_LENGTH = 2
NO_DIGEST = np.zeros(2, dtype=np.int64)


@dataclass
class Batch:
    """A micro-batch of b pairs as rows of s tokens, or the share of it that one context-parallel rank holds.

    tokens     [2b, s]  int64, row i is pair i's prompt and chosen response, row b + i its prompt and rejected response
    labels     [2b, s]  int64, the next token where that is a token of the response, its EOS included; else -100
    positions  [s]      int64, place of each column in the whole rows
    weights    [b]      fp32, factors of the pairs' losses; 0 for a dummy
    margins    [b]      fp32, nan where a pair has none; 0 for a dummy
    chosen_rewards, rejected_rewards, ref_chosen_logps, ref_rejected_logps  [b]  likewise
    chosen_tokens, rejected_tokens    [b]  fp32, tokens of each response in the whole rows; 0 for a dummy
    shared_end [b]      int64, the labels at lower positions are tokens that the other response has a counterpart of
    source     [b]      int64, number of the file the pair comes from; 0 for a dummy
    digest     [b, 2]   int64, hash of the pair's ids in two halves; 0 for a dummy
    index      [b]      int64, number of the pair in its data set; -1 for a dummy
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    weights: Tensor
    margins: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    shared_end: Tensor
    source: Tensor
    digest: Tensor
    index: Tensor

    @property
    def num_pairs(self) -> int:
        """Pairs in it, dummies not counted."""
        return int((self.index >= 0).sum())

    def shard(self, cp_rank: int, cp_size: int) -> Batch:
        """The columns of one context-parallel rank: chunks `cp_rank` and `2 cp_size - 1 - cp_rank` of `2 cp_size`.

        An early and a late chunk together cost every rank the same under causal attention.

        Returns  a batch with s / cp_size columns; pairs, weights, margins and index stay whole

        Raises `ValueError` when s is no multiple of `2 cp_size`.

        Source: Megatron-Core's `get_batch_on_this_cp_rank`, which its rotary embedding and Transformer Engine expect.
        """
        if cp_size == 1:
            return self
        columns = self.positions.shape[0]
        if columns % (2 * cp_size):
            raise ValueError(
                f"{columns} columns are not {2 * cp_size} equal chunks for {cp_size} context-parallel ranks"
            )

        def mine(tensor: Tensor) -> Tensor:
            chunks = tensor.chunk(2 * cp_size, dim=-1)
            return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]], dim=-1)

        return dataclasses.replace(
            self, tokens=mine(self.tokens), labels=mine(self.labels), positions=mine(self.positions)
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in fields.items()})


def collate(
    pairs: Sequence[TokenPair | None],
    indices: Sequence[int] | np.ndarray,
    *,
    pad_id: int,
    multiple: int = 1,
    length: int | None = None,
) -> Batch:
    """Stack pairs as rows, padded on the right to the longest row rounded up to `multiple`.

    pairs     b pairs; None is a dummy: two tokens of padding, nothing scored, weight 0
    indices   [b]  their numbers in the data set, -1 for a dummy
    pad_id    what fills a row; it is never scored, and causal attention keeps it from every token that is
    multiple  s is divisible by this
    length    s is at least this

    A prompt 11 12 with the responses 21 22 2 and 31 2, then a prompt 13 with 23 2 and 33 34 35 2; EOS is 2:

    >>> def ids(*numbers):
    ...     return np.array(numbers, dtype=np.int32)
    >>> nan = float("nan")
    >>> first = TokenPair(ids(11, 12), ids(21, 22, 2), ids(31, 2), 1.0, nan, "0a" * 16, 0)
    >>> second = TokenPair(ids(13), ids(23, 2), ids(33, 34, 35, 2), 0.5, 3.0, "0b" * 16, 0)
    >>> batch = collate([first, second], [7, 4], pad_id=0, multiple=2)
    >>> batch.tokens
    tensor([[11, 12, 21, 22,  2,  0],
            [13, 23,  2,  0,  0,  0],
            [11, 12, 31,  2,  0,  0],
            [13, 33, 34, 35,  2,  0]])
    >>> batch.labels
    tensor([[-100,   21,   22,    2, -100, -100],
            [  23,    2, -100, -100, -100, -100],
            [-100,   31,    2, -100, -100, -100],
            [  33,   34,   35,    2, -100, -100]])
    >>> batch.positions, batch.weights, batch.margins, batch.index
    (tensor([0, 1, 2, 3, 4, 5]), tensor([1.0000, 0.5000]), tensor([nan, 3.]), tensor([7, 4]))
    >>> batch.chosen_tokens, batch.rejected_tokens, batch.shared_end
    (tensor([3., 2.]), tensor([2., 4.]), tensor([3, 2]))
    """

    def column(name: str) -> Tensor:
        return torch.tensor([0.0 if pair is None else getattr(pair, name) for pair in pairs], dtype=torch.float32)

    sizes = [(1, 0, 0) if pair is None else tuple(map(len, pair[:3])) for pair in pairs]
    prompt, chosen, rejected = torch.tensor(sizes).T
    responses = [pair and pair.chosen for pair in pairs] + [pair and pair.rejected for pair in pairs]
    rows = list(zip([*pairs, *pairs], responses, strict=True))
    longest = max(DUMMY_LENGTH if pair is None else len(pair.prompt) + len(response) for pair, response in rows)
    columns = -(-max(longest, length or 0) // multiple) * multiple
    tokens = np.full((len(rows), columns), pad_id, dtype=np.int64)
    labels = np.full((len(rows), columns), IGNORED, dtype=np.int64)
    for row, (pair, response) in enumerate(rows):
        if pair is not None:
            start, end = len(pair.prompt), len(pair.prompt) + len(response)
            tokens[row, :start] = pair.prompt
            tokens[row, start:end] = response
            labels[row, start - 1 : end - 1] = response
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.arange(columns),
        weights=column("weight"),
        margins=column("margin"),
        chosen_rewards=column("chosen_reward"),
        rejected_rewards=column("rejected_reward"),
        ref_chosen_logps=column("ref_chosen_logps"),
        ref_rejected_logps=column("ref_rejected_logps"),
        chosen_tokens=chosen.float(),
        rejected_tokens=rejected.float(),
        shared_end=prompt - 1 + torch.minimum(chosen, rejected),
        source=torch.tensor([0 if pair is None else pair.source for pair in pairs]),
        digest=torch.from_numpy(
            np.stack([NO_DIGEST if pair is None else digest_halves(pair.digest) for pair in pairs])
        ),
        index=torch.tensor(np.asarray(indices), dtype=torch.int64),
    )
