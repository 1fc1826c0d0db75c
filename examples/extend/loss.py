"""A plugin with a loss. The run lists this module under `plugins`; the engine is not edited."""

import torch.nn.functional as F
from torch import Tensor

from dpo_engine.objective.losses import LOSSES, PairLogps


@LOSSES.register("squared_hinge", needs_reference=True, at_init=lambda options: options["target"] ** 2)
def squared_hinge(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, target: float = 1.0) -> Tensor:
    """``max(0, target - m)^2``, where m is the reward margin. The loss is 0 if a pair's margin is at least ``target``.

    Returns  [b]
    """
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)  # [b]
    return F.relu(target - beta * margin).square()
