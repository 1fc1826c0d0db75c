"""A fork's own loss: one file, named by `plugins:` in a run, no engine edits."""

import math

import torch.nn.functional as F
from torch import Tensor

from dpo_engine.objective.losses import LOSSES, PairLogps


@LOSSES.register("offset", needs_reference=True, at_init=lambda options: math.log1p(math.exp(options["offset"])))
def offset(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, offset: float = 1.0) -> Tensor:
    """DPO that asks for a reward margin of at least ``offset``.

    Returns  [b]  nats

    *Source*: ODPO (arXiv 2402.10571), with the same offset for every pair.
    """
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)  # [b]
    return -F.logsigmoid(beta * margin - offset)
