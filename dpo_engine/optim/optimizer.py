"""Set up Megatron's data-parallel wrapper, optimizer, and learning rate schedule, and update the weights in a step.

Megatron is configured to sum gradients without rescaling them, because the training step divides the loss by the total
weight of the global batch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from dpo_engine.config.sections import OptimConfig, ParallelConfig
from dpo_engine.faults import reach
from dpo_engine.model.policy import Policy
from dpo_engine.optim.host_states import HostAdamW
from dpo_engine.optim.optimizers import OPTIMIZERS, build_torch_optimizer
from dpo_engine.optim.pieces import PiecewiseAdamW, update_in_pieces
from dpo_engine.optim.schedule import build_schedule
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.platform.ranges import part

EXPERTS = "is_expert_parallel"
"""Key in Megatron's parameter groups: whether a group's parameters belong to experts."""


class Trained(NamedTuple):
    """The objects that an optimizer step updates.

    chunks     this rank's model chunks, wrapped in Megatron's DDP, which owns the gradient buffers
    optimizer  Megatron's optimizer for all chunks
    schedule   learning rate schedule; the current learning rate is the one for step ``schedule.num_steps``
    moments    names of the tensors that the optimizer keeps for each parameter
    """

    chunks: list[DistributedDataParallel]
    optimizer: Any
    schedule: OptimizerParamScheduler
    moments: tuple[str, ...] = OPTIMIZERS["adamw"].state

    @property
    def instance(self) -> int:
        """Index of this rank's instance of the distributed optimizer; all instances have the same state."""
        group = getattr(self.chunks[0], "inter_dist_opt_group", None)  # set only if there are several instances
        return group.rank() if group else 0

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts, on any rank."""
        return self.chunks[0].config.num_moe_experts is not None


def wrap_policy(
    chunks: list[Policy],
    *,
    groups: ParallelGroups,
    parallel: ParallelConfig,
    gradients: str = "fp32",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP, which sums gradients over ``dp_cp``, or over ``expt_dp`` for experts.

    gradients  ``optim.gradients``: with ``fp32``, gradients are summed in fp32 or wider; with ``bf16``, in the
               parameters' dtype
    options    further fields of DDP's configuration, from the section ``megatron.ddp``

    This function also sets ``finalize_model_grads_func`` in Megatron's model config, so that the pipeline schedules
    reduce gradients without rescaling them. With ``parallel.overlap``, it also sets the callbacks that delay, start
    and await the overlapped communication. The pipeline schedules and the chunks call these callbacks.
    """
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradients == "fp32" and config.params_dtype is not torch.float64,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
        **options,
    )
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            pg_collection=groups.megatron,
            disable_bucketing=index > 0,  # buckets help only in the first chunk, whose gradients are computed last
        )
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap:
        for chunk, ddp in zip(chunks, wrapped, strict=True):
            if chunk.post_process and chunk.head.requires_grad:
                chunk.head.counted = True
                if ddp_config.overlap_param_gather:
                    finish_gather = ddp.param_to_bucket_group[chunk.head].finish_param_sync
                    chunk.await_head = partial(finish_gather, skip_next_bucket_dispatch=ddp_config.align_param_gather)
            if chunk.graphs is not None and ddp_config.overlap_param_gather:
                chunk.graphs.await_weights = partial(_await_layer, ddp)
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        # With these options, Megatron's hooks do not start all-gathers ahead of time. Megatron's pipeline schedules
        # start them by calling `param_sync_func`.
        config.param_sync_func = [partial(_start_gathers, chunk) for chunk in wrapped]

    def finish(model: list[torch.nn.Module], num_tokens: Any = None, **megatron: Any) -> None:
        reach("reduce")
        with part("reduce"):
            finalize_model_grads(model, None, pg_collection=groups.megatron)

    config.finalize_model_grads_func = finish
    return wrapped


def _await_layer(ddp: DistributedDataParallel, layer: torch.nn.Module) -> None:
    """Wait until all weights of a layer are gathered, as Megatron's hooks do when the layer's modules are called.

    *Collectives*: over dp_cp, the all-gathers of these weights and, without ``align_param_gather``, the all-gather of
    the next bucket's weights.
    """
    for parameter in layer.parameters():
        if parameter in ddp.param_to_bucket_group:
            finish = ddp.param_to_bucket_group[parameter].finish_param_sync
            finish(skip_next_bucket_dispatch=ddp.ddp_config.align_param_gather)


def _start_gathers(chunk: DistributedDataParallel, *parameters: Any) -> None:
    """Start those all-gathers of a chunk's weights that have not started since the last update.

    An earlier forward pass of the same step, such as the scoring pass of a coupled loss, may have started some of them.

    *Collectives*: these all-gathers, over dp_cp (for experts' weights, over expt_dp).
    """
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if not group.param_gather_dispatched:
            group.start_param_sync()


def build_optimizer(
    chunks: list[DistributedDataParallel],
    optim: OptimConfig,
    *,
    parallel: ParallelConfig,
    total_steps: int,
) -> Trained:
    """Build the optimizer for ``chunks``, and the schedule at step 0. Main weights are fp32 (fp64 for an fp64 model).

    Biases and norm weights have no weight decay. Frozen parameters, those with ``requires_grad=False``, have no
    optimizer state. Load the weights before calling this function, because it copies them to the main weights.
    ``optim.states`` decides where main weights and moments are stored; those of an fp64 model are always on the device.
    """
    dtype = chunks[0].config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    if optim.optimizer == "adamw" and dtype is not torch.float64:
        kind = _in_pieces(optim, parallel, dtype)
        # If this is True, Megatron creates no main weights. update_in_pieces() sets it to False again.
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = kind is not None
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
        if kind:
            update_in_pieces(optimizer, kind)
        elif torch.cuda.is_available():
            fuse_adam(optimizer)
    else:
        kinds = (False, True) if chunks[0].config.num_moe_experts else (False,)
        single = [_plain_optimizer(_torch_optimizer(chunks, optim, experts=kind), config) for kind in kinds]
        optimizer = ChainedOptimizer(single) if len(single) > 1 else single[0]
    schedule = build_schedule(optimizer, optim, total_steps=total_steps)
    return Trained(chunks, optimizer, schedule, tuple(OPTIMIZERS[optim.optimizer].state))


def _in_pieces(optim: OptimConfig, parallel: ParallelConfig, dtype: torch.dtype) -> type[PiecewiseAdamW] | None:
    """Return the class that updates weights in pieces; None if Megatron's optimizer updates all weights at once."""
    if optim.states == "host":
        return HostAdamW
    rounded = optim.gradients == "bf16" and dtype is torch.bfloat16
    return PiecewiseAdamW if rounded and parallel.distributed_optimizer else None


def _plain_optimizer(optimizer: torch.optim.Optimizer | None, config: OptimizerConfig) -> Any:
    """Wrap a torch optimizer in Megatron's optimizer class for bf16 or wider dtypes. Neither class shards states."""
    if config.bf16:
        return Float16OptimizerWithFloat16Params(optimizer, config, None, lambda *states: None)
    return FP32Optimizer(optimizer, config, lambda *states: None)


def _torch_optimizer(
    chunks: list[DistributedDataParallel], optim: OptimConfig, *, experts: bool = False
) -> torch.optim.Optimizer | None:
    """Build the torch optimizer for the parameters of experts, or for all other parameters.

    experts  True: for the parameters of experts; False: for all other parameters

    Returns None if all of these parameters are frozen.
    """
    every = (parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad)
    parameters = [parameter for parameter in every if getattr(parameter, "allreduce", True) != experts]
    matrices = {"params": [p for p in parameters if p.dim() > 1], "wd_mult": 1.0, EXPERTS: experts}
    others = {"params": [p for p in parameters if p.dim() <= 1], "wd_mult": 0.0, EXPERTS: experts}
    groups = [group for group in (matrices, others) if group["params"]]
    if not groups:
        return None
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    return build_torch_optimizer(optim.optimizer, optim.optimizer_options, groups, optim.lr)


def fuse_adam(optimizer: Any) -> None:
    """Make torch's AdamW update all parameters in one kernel per group. Other implementations of Adam are fused anyway.

    Without this function, torch's AdamW would use its ``foreach`` form, which temporarily needs another 4 bytes per
    parameter that the rank owns. With full recomputation, this temporary memory determines the run's peak memory.
    """
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(single.optimizer, torch.optim.AdamW):
            for group in single.optimizer.param_groups:
                group["fused"] = True


def reduced_gradients(optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the reduced gradients that this rank contributes to sums over the model.

    In such a sum, each gradient of the model counts exactly once.

    Returns  two lists: the gradients of all parameters that belong to no expert, and those of the experts' parameters
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(single, "is_stub_optimizer", False):  # a stub has no parameters on this rank
            # Megatron-Core 0.19 renamed the method to get_grads_for_grad_norm.
            wanted = getattr(single, "get_grads_for_grad_norm", None) or single.get_main_grads_for_grad_norm
            found[bool(single.param_groups[0].get(EXPERTS))].extend(wanted())
    return found


def sum_over_model(trained: Trained, others: Tensor, experts: Tensor) -> Tensor:
    """Sum a quantity over all gradients of the model, each of which is counted once; see :func:`reduced_gradients`.

    others   this rank's part of the sum, for all parameters that belong to no expert; it may be overwritten
    experts  this rank's part of the sum, for the experts' parameters; it may be overwritten

    *Collectives*: with the distributed optimizer, one SUM over all ranks of this rank's instance of that optimizer.
    Without the distributed optimizer, one SUM over tp and pp and, for a model with experts, one more SUM over the ranks
    that together hold one copy of all experts.
    """
    if not trained.has_experts:
        dist.all_reduce(others, group=trained.optimizer.get_grad_stats_parallel_group())
        return others
    if trained.chunks[0].ddp_config.use_distributed_optimizer:
        total = others + experts
        dist.all_reduce(total, group=parallel_state.get_intra_distributed_optimizer_instance_group())
        return total
    dist.all_reduce(others, group=parallel_state.get_model_parallel_group())
    dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return others + experts


@torch.no_grad()
def gradient_norm(trained: Trained) -> float:
    """Return the global norm of the reduced gradients. The host waits for the device once.

    In Megatron's own function, the host waits once per parameter if neither Apex nor Transformer Engine is installed.

    *Collectives*: those of :func:`sum_over_model`.
    """
    dtype = torch.promote_types(trained.optimizer.config.params_dtype, torch.float32)
    device = torch.cuda.current_device()
    squares = [
        # For an empty list, torch returns a norm on the CPU, and the host would wait for the copy to the device.
        _norm(grads, dtype).to(device, dtype).square() if grads else torch.zeros((), dtype=dtype, device=device)
        for grads in reduced_gradients(trained.optimizer)
    ]
    return float(sum_over_model(trained, *squares)) ** 0.5


def _norm(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    if all(grad.dtype.itemsize >= dtype.itemsize for grad in grads):
        return torch.nn.utils.get_total_norm(grads)
    # If weights are updated in pieces, gradients can be in bf16, and torch would round each norm to bf16.
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad, dtype=dtype) for grad in grads]))


def update(trained: Trained, refuses: Callable[[float], bool]) -> float:
    """Clip the reduced gradients and update the weights once, unless ``refuses(gradient norm)`` is true.

    If the update is refused, the weights, the main weights, and the optimizer state do not change.

    Returns  the global gradient norm before clipping

    *Collectives*: those of :func:`gradient_norm`, and of ``refuses``; with the distributed optimizer, an all-gather of
    the parameters over dp_cp (for experts' parameters, over expt_dp) after an update. With ``parallel.overlap``, this
    all-gather overlaps with the next forward pass; see :func:`~dpo_engine.model.policy.await_weights`.
    """
    # These are the statements of Megatron's `step`, with a call to `refuses` between the norm and the update.
    optimizer = trained.optimizer
    optimizer.prepare_grads()
    grad_norm = gradient_norm(trained)
    if not refuses(grad_norm):
        limit, dtype = optimizer.config.clip_grad, optimizer.config.params_dtype
        if 0 < limit < grad_norm:
            # Clipping is faster if the norm has the gradients' dtype. If the norm were a tensor on the host, the host
            # would wait until the norm is copied to the device.
            wide, device = torch.promote_types(dtype, torch.float32), torch.cuda.current_device()
            norm = torch.full((), grad_norm, dtype=wide, device=device)
            for single in getattr(optimizer, "chained_optimizers", [optimizer]):
                if isinstance(single.optimizer, PiecewiseAdamW):
                    single.optimizer.factor = limit / (norm + 1e-6)  # as torch does
                else:
                    torch.nn.utils.clip_grads_with_norm_(single.get_parameters(), limit, norm)
        optimizer.step_with_ready_grads()
    return grad_norm
