"""Build the learning rate schedule: linear warmup, then the configured decay, with Megatron's scheduler."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dpo_engine.config.sections import OptimConfig

DECAY_STYLES = {"wsd": "WSD", "inverse_sqrt": "inverse-square-root"}


def build_schedule(optimizer: Any, optim: OptimConfig, *, total_steps: int) -> OptimizerParamScheduler:
    """Return a schedule with linear warmup to ``optim.lr``, and then the configured decay to ``optim.min_lr``.

    The decay of ``cosine``, ``linear`` and ``wsd`` ends at ``total_steps``; ``constant`` does not decay. With warmup,
    the learning rate for step 0 is 0, as in Megatron and transformers.
    """
    warmup = warmup_steps(optim, total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, warmup + 1),
        lr_decay_style=DECAY_STYLES.get(optim.schedule, optim.schedule),
        wsd_decay_steps=optim.decay_steps if optim.decay_steps is not None else max(1, total_steps // 10),
        lr_wsd_decay_style="linear",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Return the number of warmup steps: ``optim.warmup_steps``, or ``optim.warmup_ratio`` of all steps, rounded up."""
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    return -int(-total_steps * optim.warmup_ratio // 1) if optim.warmup_ratio else 0


def reads_length(optim: OptimConfig) -> bool:
    """Whether the learning rate for a step depends on the total number of steps."""
    warmup_is_share = optim.warmup_steps is None and bool(optim.warmup_ratio)
    return optim.schedule in ("cosine", "linear", "wsd") or warmup_is_share
