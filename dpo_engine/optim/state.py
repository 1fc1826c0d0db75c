"""Provide a uniform view of optimizer state: the slices of parameters that this rank owns, and their moments.

An optimizer updates main weights, and keeps moments for them. Megatron stores the main weights in three ways: as the
model's own fp32 or fp64 parameters, as fp32 copies of bf16 parameters, and as flat ranges in the distributed optimizer.
With ``optim.gradients: bf16`` or ``optim.states: host``, the engine updates these ranges itself. The implementations of
Adam also store the scalar ``step`` in different places.

Checkpoints use only the view in this module. Between saving and loading, a run can therefore change its layout, or the
way in which it stores this state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from dpo_engine.errors import ConfigError
from dpo_engine.optim.optimizer import Trained
from dpo_engine.optim.pieces import PiecewiseAdamW


@dataclass(frozen=True)
class OwnedSlice:
    """A contiguous range of a flattened local parameter that this rank's optimizer updates.

    parameter    the model's parameter (this tensor-parallel rank's shard)
    start, stop  the range ``parameter.view(-1)[start:stop]``
    main         the tensor that the optimizer updates, in fp32 (fp64 for an fp64 model), with ``stop - start`` elements
    separate     whether ``main`` is a copy; False if ``main`` shares memory with the parameter
    optimizer    the torch-style optimizer whose ``state[main]`` holds the moments
    names        names of the moments: ``exp_avg`` and ``exp_avg_sq`` for AdamW
    """

    parameter: Tensor
    start: int
    stop: int
    main: Tensor
    separate: bool
    optimizer: Any
    names: tuple[str, ...]

    def moments(self) -> dict[str, Tensor]:
        """Return flat views of the moments. Before the optimizer's first step, create them as zeros.

        Raises :class:`~dpo_engine.errors.ConfigError` if one of torch's own optimizers keeps a tensor that has the
        shape of ``main``, but whose name is not in ``names``.
        """
        state = self.optimizer.state[self.main]
        kept = [name for name, value in state.items() if isinstance(value, Tensor) and value.shape == self.main.shape]
        lost = [name for name in kept if name not in (*self.names, "step")]
        if lost and counts_by_parameter(self.optimizer):
            raise ConfigError(
                f"optim.optimizer: keeps the tensor {lost[0]} for each parameter, but is registered with "
                f"state={self.names}; add {lost[0]} to state, or checkpoints would lose this tensor"
            )
        for name in self.names:
            if name not in state:
                state[name] = torch.zeros_like(self.main, memory_format=torch.preserve_format)
                if counts_by_parameter(self.optimizer):
                    # torch's optimizers initialize a state only if it is empty, so this state must also have `step`.
                    state.setdefault("step", _count(self, 0))
        return {name: state[name].view(-1) for name in self.names}


def _count(owned: OwnedSlice, step: int) -> Tensor:
    """Return torch AdamW's step count for one parameter, on the device where AdamW reads it (the CPU unless fused)."""
    fused = any(group.get("fused") for group in owned.optimizer.param_groups)
    return torch.tensor(float(step), dtype=torch.float32, device=owned.main.device if fused else "cpu")


def owned_slices(trained: Trained) -> Iterator[OwnedSlice]:
    """Yield every slice that this rank's optimizer owns.

    Without the distributed optimizer, every data-parallel rank owns all parameters of its model chunks.
    """
    names = trained.moments
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        inner = optimizer.optimizer
        if inner is None:  # all parameters of this rank are frozen
            continue
        if isinstance(optimizer, DistributedOptimizer):
            for parameter, (group, order) in optimizer.model_param_group_index_map.items():
                span = optimizer._get_model_param_range_map(parameter)["param"]
                main = inner.param_groups[group]["params"][order]
                separate = parameter.dtype is not torch.float32
                if isinstance(inner, PiecewiseAdamW):
                    main, separate = inner.mains[main], separate or inner.on_host
                yield OwnedSlice(parameter, span.start, span.end, main, separate, inner, names)
        elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
            for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
                for parameter, main in zip(models, mains, strict=True):
                    yield OwnedSlice(parameter, 0, parameter.numel(), main, True, inner, names)
            for group in optimizer.fp32_from_fp32_groups:
                for parameter in group:
                    yield OwnedSlice(parameter, 0, parameter.numel(), parameter, False, inner, names)
        else:
            for group in inner.param_groups:
                for parameter in group["params"]:
                    yield OwnedSlice(parameter, 0, parameter.numel(), parameter, False, inner, names)


def counts_by_parameter(optimizer: Any) -> bool:
    """Whether an optimizer is one of torch's own, such as torch's AdamW.

    For these optimizers, this module stores a step count for each parameter, because torch's AdamW reads it there.
    """
    return isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__module__.startswith("torch.")


def not_finite(trained: Trained) -> Iterator[tuple[Tensor, str]]:
    """Yield ``(parameter, name)`` for each main tensor or moment with a non-finite value.

    ``parameter`` is the owned parameter to which the tensor belongs. ``name`` is ``main`` or the moment's name.
    """
    found = []
    for owned in owned_slices(trained):
        state = owned.optimizer.state[owned.main] if owned.main in owned.optimizer.state else {}
        tensors = {"main": owned.main, **{name: state[name] for name in owned.names if name in state}}
        extremes = {kind: torch.stack(tensor.detach().aminmax()) for kind, tensor in tensors.items() if tensor.numel()}
        found += [(owned.parameter, kind, pair) for kind, pair in extremes.items()]
    if found:
        finite = torch.stack([pair for *_, pair in found]).isfinite().all(1).tolist()
        yield from ((parameter, kind) for (parameter, kind, _), fit in zip(found, finite, strict=True) if not fit)


def set_adam_step(trained: Trained, step: int) -> None:
    """Set each optimizer's count of updates to ``step``.

    torch's AdamW stores a count for each parameter, in a tensor. Each parameter needs its own tensor, because a shared
    tensor would be incremented once for every parameter. Apex and Transformer Engine store the count in the parameter
    group.
    """
    for owned in owned_slices(trained):
        owned.moments()  # create the moments, because torch's AdamW creates none if the state already has `step`
        if counts_by_parameter(owned.optimizer):
            owned.optimizer.state[owned.main]["step"] = _count(owned, step)
        for group in owned.optimizer.param_groups:
            if "step" in group or not counts_by_parameter(owned.optimizer):
                group["step"] = step


def adam_step(trained: Trained) -> int:
    """Return the number of updates that Adam has made so far.

    Return 0 for an optimizer that does not count its updates, and on a rank that owns no parameters.
    """
    for owned in owned_slices(trained):
        for kept in (owned.optimizer.state[owned.main], *owned.optimizer.param_groups):
            if "step" in kept:
                return int(kept["step"])
    return 0


def after_load(trained: Trained) -> None:
    """Copy the main weights to the model weights after a checkpoint has been loaded.

    *Collectives*: with the distributed optimizer, an all-gather of the parameters over dp_cp (for experts' parameters,
    over expt_dp).
    """
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        mixed = isinstance(optimizer, (DistributedOptimizer, Float16OptimizerWithFloat16Params))
        if mixed and not optimizer.is_stub_optimizer:  # a stub: all parameters of this rank are frozen
            if isinstance(optimizer.optimizer, PiecewiseAdamW):
                optimizer.optimizer.write_weights()
            else:
                optimizer._copy_main_params_to_model_params()
    for chunk in trained.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
