"""Change a model's weights in a way that depends on neither the layout nor the rank."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.table import pieces, placed_parameters
from dpo_engine.platform.parallel import ParallelGroups


@torch.no_grad()
def perturb(chunks: Sequence[nn.Module], arch: Architecture, *, groups: ParallelGroups, amount: float) -> None:
    """Multiply each row of each weight by its own random factor between ``1 - amount`` and ``1 + amount``.

    A factor depends only on the tensor's name in the weight table and on the row in this tensor (the column, if the
    tensor is stored transposed). All layouts therefore get the same model. Each element of a vector (norm, bias) is a
    row.

    chunks   this rank's model chunks, without a DDP wrapper. If an optimizer keeps main weights, call its
             ``reload_model_params`` afterwards
    """
    for placed in placed_parameters(chunks, arch, groups):
        names = [tensor.name for tensor in placed.tensors(arch)]
        rows, rank, tp = placed.parameter.shape[0], placed.shards.rank(), placed.shards.size()
        for tensor, taken, place in pieces(placed.rule, arch, shard_rows=rows, rank=rank, tp=tp):
            shard = placed.parameter[place]
            factors = torch.from_numpy(1 + amount * _draws(names[tensor], taken.stop)[taken])
            # A bf16 weight is multiplied by fp32 factors, so the product is rounded only once.
            factors = factors.to(shard.device, torch.promote_types(shard.dtype, torch.float32))
            shard.mul_(factors.view(-1, *[1] * (shard.dim() - 1)))


def _draws(name: str, count: int) -> np.ndarray:
    """Return the first ``count`` numbers, between -1 and 1, of a sequence that depends only on ``name``."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return np.random.PCG64(seed).random_raw(count) / 2.0**63 - 1
