"""Count the gradient values that are exactly 0, for the metric ``num_zeros_in_grad``."""

import torch
from megatron.core.transformer.module import param_is_not_shared

from dpo_engine.optim.optimizer import Trained, reduced_gradients, sum_over_model
from dpo_engine.platform.parallel import ParallelGroups

TABLES = ("word_embeddings.weight", "output_layer.weight")


def num_zeros(trained: Trained, *, vocab_size: int, groups: ParallelGroups) -> float:
    """Return the number of zeros in the reduced gradients of the whole model. Frozen weights are not counted.

    Megatron's ``count_zeros`` adds in fp32, which is exact only up to 2^24, and also counts the vocabulary's padding
    rows. This function adds in int64 and leaves out these rows, so the number does not depend on the layout.

    *Collectives*: those of :func:`~dpo_engine.optim.optimizer.sum_over_model`.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=next(trained.chunks[0].parameters()).device)
    for count, gradients in zip(counts, reduced_gradients(trained.optimizer), strict=True):
        for gradient in gradients:
            count += gradient.numel() - torch.count_nonzero(gradient)
    # The distributed optimizer shards gradients over dp_cp or, with several instances, over the dp_cp ranks of one
    # instance. One of these ranks subtracts the padding of all shards.
    if not trained.chunks[0].ddp_config.use_distributed_optimizer or trained.chunks[0].intra_dp_cp_group.rank() == 0:
        counts[0] -= _padding(trained, vocab_size, groups.tp.rank())
    return float(sum_over_model(trained, *counts))


def _padding(trained: Trained, vocab_size: int, tp_rank: int) -> int:
    """Return the number of gradient values in this rank's padding rows of the vocabulary; these values are all 0."""
    total = 0
    for chunk in trained.chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(TABLES) and parameter.requires_grad and param_is_not_shared(parameter):
                rows, width = parameter.shape
                total += min(rows, max(0, (tp_rank + 1) * rows - vocab_size)) * width
    return total
