"""Compute the log-probability of each token of selected pairs, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.data.dataset import PairDataset
from dpo_engine.model.pipeline import logit_softcap, run_pipeline
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.scoring.logps import site_logps


@torch.no_grad()
def score_sites(
    chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], *, vocab_size: int, groups: ParallelGroups
) -> list[Tensor]:
    """Compute the log-probability of each scored site with one forward pass of the model ``chunks`` per micro-batch.

    A site is the place of a token that predicts a scored token; see :class:`~dpo_engine.batching.batches.Scored`.

    Returns  on the last stage, one tensor [m] per micro-batch, for the sites of this context-parallel rank; on the
             other stages, an empty list

    *Collectives*: those of :func:`~dpo_engine.scoring.logps.site_logps`; also the pipeline's point-to-point transfers.
    """

    options = {"vocab_size": vocab_size, "softcap": logit_softcap(chunks)}

    def finish(index: int, batch: Batch, hidden: Tensor, head: Tensor) -> tuple[Tensor, Any]:
        return hidden.new_zeros(()), site_logps(hidden, head, batch, groups=groups, **options)

    return run_pipeline(chunks, batches, finish, groups=groups, backward=False)


def token_logps(
    sites: Sequence[Tensor], batches: Sequence[Batch], pairs: PairDataset, indices: np.ndarray, groups: ParallelGroups
) -> np.ndarray:
    """Assign the log-probabilities of scored sites to the tokens of the responses.

    sites    the log-probabilities of this rank's sites, from :func:`score_sites`
    batches  the micro-batches of the pairs ``indices``
    indices  [n]  indices of pairs in ``pairs``, ascending, without duplicates

    A sequence is a prompt followed by one response. In every layout, ``Batch.positions`` contains one number for each
    column of the micro-batch: the position of the column's tokens in their sequences. A site predicts the token at the
    next position. The index of this token in the response is ``position + 1 - len(prompt)``.

    Returns  on every rank, one value per response token, in nats: for each pair in turn, first the tokens of the chosen
             response and then the tokens of the rejected response; 0 for a token that is not scored

    *Collectives*: on the last stage, a SUM over cp and a SUM over dp, each of one fp64 number per token; then a
    broadcast of these numbers over pp from the last stage.
    """
    lengths = pairs.lengths[indices].astype(np.int64)
    ends = lengths[:, 1:].reshape(-1).cumsum()
    device = batches[0].tokens.device
    values = torch.zeros(int(ends[-1]), dtype=torch.float64, device=device)
    if groups.last_stage:
        starts = torch.from_numpy(np.concatenate([[0], ends[:-1]]).reshape(-1, 2)).to(device)
        prompts = torch.from_numpy(lengths[:, 0]).to(device)
        known = torch.from_numpy(np.ascontiguousarray(indices)).to(device)
        for batch, logps in zip(batches, sites, strict=True):
            scored, count = batch.scored, len(batch.index)
            side, place = scored.owner // count, scored.owner % count
            pair = torch.searchsorted(known, batch.index[place])
            column = scored.sites[scored.take] // len(batch.tokens)
            offset = batch.positions[column] + 1 - prompts[pair]
            values[starts[pair, side] + offset] = logps[scored.take].double()
        for group in (groups.cp, groups.dp):
            if group.size() > 1:
                dist.all_reduce(values, group=group)
    if groups.pp.size() > 1:
        dist.broadcast(values, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    return values.cpu().numpy()
