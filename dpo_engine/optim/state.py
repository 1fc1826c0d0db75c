"""Which elements of which parameter this rank's optimizer owns, and their Adam state: one view of three kinds.

Megatron keeps the state in three shapes (fp32, bf16 with fp32 copies, and the distributed optimizer's flat ranges), and
the scalar ``step`` differently for each Adam. Checkpoints see only the view made here, so that a run may change its
layout or its kind of optimizer between saving and loading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from dpo_engine.optim.optimizer import Trained

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedSlice:
    """A run of elements of one local parameter, flattened, that this rank's optimizer updates.

    parameter    the model's parameter (this tensor-parallel rank's shard)
    start, stop  its elements ``parameter.view(-1)[start:stop]``
    main         the fp32 tensor Adam updates, with ``stop - start`` elements
    separate     whether ``main`` is a copy; False where the parameter itself is fp32 and shares its memory
    optimizer    the torch-style optimizer whose ``state[main]`` holds the moments
    """

    parameter: Tensor
    start: int
    stop: int
    main: Tensor
    separate: bool
    optimizer: Any

    def moments(self) -> dict[str, Tensor]:
        """Flat views of ``exp_avg`` and ``exp_avg_sq``; zeros are put in place where Adam has made no step yet."""
        state = self.optimizer.state[self.main]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(self.main, memory_format=torch.preserve_format)
                if counts_by_parameter(self.optimizer):
                    # A state that is not empty is taken for a whole one.
                    state.setdefault("step", torch.tensor(0.0))
        return {name: state[name].view(-1) for name in MOMENTS}


def owned_slices(trained: Trained) -> Iterator[OwnedSlice]:
    """Every slice this rank's optimizer owns. Under the plain optimizer all data-parallel ranks own everything."""
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        inner = optimizer.optimizer
        if inner is None:
            continue
        if isinstance(optimizer, DistributedOptimizer):
            for parameter, (group, order) in optimizer.model_param_group_index_map.items():
                span = optimizer._get_model_param_range_map(parameter)["param"]
                main = inner.param_groups[group]["params"][order]
                separate = parameter.dtype is not torch.float32
                yield OwnedSlice(parameter, span.start, span.end, main, separate, inner)
        elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
            for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
                for parameter, main in zip(models, mains, strict=True):
                    yield OwnedSlice(parameter, 0, parameter.numel(), main, True, inner)
            for group in optimizer.fp32_from_fp32_groups:
                for parameter in group:
                    yield OwnedSlice(parameter, 0, parameter.numel(), parameter, False, inner)
        else:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    yield OwnedSlice(parameter, 0, parameter.numel(), parameter, False, inner)


def counts_by_parameter(optimizer: Any) -> bool:
    """Whether an Adam keeps its count of updates by parameter, as torch's does."""
    return isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__module__.startswith("torch.")


def not_finite(trained: Trained) -> Iterator[tuple[Tensor, str]]:
    """Parameters that this rank's optimizer owns and that are not finite, and which of main and moments is not."""
    found = []
    for owned in owned_slices(trained):
        state = owned.optimizer.state[owned.main] if owned.main in owned.optimizer.state else {}
        tensors = {"main": owned.main, **{name: state[name] for name in MOMENTS if name in state}}
        extremes = {kind: torch.stack(tensor.detach().aminmax()) for kind, tensor in tensors.items() if tensor.numel()}
        found += [(owned.parameter, kind, pair) for kind, pair in extremes.items()]
    if found:
        finite = torch.stack([pair for *_, pair in found]).isfinite().all(1).tolist()
        yield from ((parameter, kind) for (parameter, kind, _), fit in zip(found, finite, strict=True) if not fit)


def set_adam_step(trained: Trained, step: int) -> None:
    """Tell every Adam that it has made ``step`` updates.

    torch's AdamW keeps the count per parameter, each in its own tensor: one tensor shared by several parameters would
    advance once for each of them. Apex's and Transformer Engine's keep it in the parameter group.
    """
    for owned in owned_slices(trained):
        owned.moments()  # torch's AdamW makes them only where it finds no state at all
        if counts_by_parameter(owned.optimizer):
            owned.optimizer.state[owned.main]["step"] = torch.tensor(float(step), dtype=torch.float32)
        for group in owned.optimizer.param_groups:
            if "step" in group or not counts_by_parameter(owned.optimizer):
                group["step"] = step


def adam_step(trained: Trained) -> int:
    """Updates that Adam has made so far; 0 on a rank that owns nothing."""
    for owned in owned_slices(trained):
        for kept in (owned.optimizer.state[owned.main], *owned.optimizer.param_groups):
            if "step" in kept:
                return int(kept["step"])
    return 0


def after_load(trained: Trained) -> None:
    """Bring model weights and main weights together after both were written from outside.

    *Collectives*: with the distributed optimizer, an all-gather of the parameters over dp_cp.
    """
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        if isinstance(optimizer, (DistributedOptimizer, Float16OptimizerWithFloat16Params)):
            optimizer._copy_main_params_to_model_params()
    for chunk in trained.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
