"""Count the gradient values that are exactly 0, for the metric ``num_zeros_in_grad``."""

import torch
import torch.distributed as dist
from megatron.core.transformer.module import param_is_not_shared

from dpo_engine.optim.optimizer import Trained, reduced_gradients
from dpo_engine.platform.parallel import ParallelGroups

TABLES = ("word_embeddings.weight", "output_layer.weight")


def num_zeros(trained: Trained, *, vocab_size: int, groups: ParallelGroups) -> float:
    """Return the number of zeros in the reduced gradients of the whole model. Frozen weights do not count.

    Megatron's ``count_zeros`` adds in fp32, which is exact only up to 2^24, and counts the rows that pad the vocabulary
    to a multiple of tp. This function counts integers, and leaves out these rows, so the number does not depend on the
    layout.

    *Collectives*: SUM of one number over the ranks that compute the gradient norm together.
    """
    optimizer = trained.optimizer
    count = torch.zeros((), dtype=torch.int64, device=next(trained.chunks[0].parameters()).device)
    for gradient in reduced_gradients(optimizer):
        count += gradient.numel() - torch.count_nonzero(gradient)
    # With the distributed optimizer, the sum is over all ranks, but each padding row has only one gradient.
    if not trained.chunks[0].ddp_config.use_distributed_optimizer or groups.dp_cp.rank() == 0:
        count -= _padding(trained, vocab_size, groups.tp.rank())
    dist.all_reduce(count, group=optimizer.get_grad_stats_parallel_group())
    return float(count)


def _padding(trained: Trained, vocab_size: int, tp_rank: int) -> int:
    """Return the number of gradient values in this rank's rows of tokens that do not exist; all of them are 0."""
    total = 0
    for chunk in trained.chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(TABLES) and parameter.requires_grad and param_is_not_shared(parameter):
                rows, width = parameter.shape
                total += min(rows, max(0, (tp_rank + 1) * rows - vocab_size)) * width
    return total
