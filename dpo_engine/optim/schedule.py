"""Build a learning rate schedule with Megatron's scheduler: linear warmup, and then the configured decay."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dpo_engine.config.sections import OptimConfig
from dpo_engine.errors import ConfigError
from dpo_engine.optim.schedules import SCHEDULES, MegatronSchedule, factors, warmup_steps


class RegisteredSchedule(OptimizerParamScheduler):
    """A scheduler that uses Megatron's linear warmup, and after the warmup the factors of a registered schedule.

    factors  ``factors[i]`` applies ``i`` steps after the warmup; the last factor also applies to later steps
    """

    def __init__(self, optimizer: Any, *, factors: list[float], **megatron: Any):
        self.factors = factors
        super().__init__(optimizer, lr_decay_style="constant", **megatron)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the learning rate of a parameter group for step ``num_steps``."""
        if self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps:
            return super().get_lr(param_group)
        highest, lowest = param_group.get("max_lr", self.max_lr), param_group.get("min_lr", self.min_lr)
        step = min(self.num_steps - self.lr_warmup_steps, len(self.factors) - 1)
        return lowest + (highest - lowest) * self.factors[step]


def build_schedule(optimizer: Any, optim: OptimConfig, *, total_steps: int) -> OptimizerParamScheduler:
    """Return a schedule with linear warmup to ``optim.lr``, and then the configured decay.

    The decay of ``cosine``, ``linear`` and ``wsd`` ends at ``total_steps``, with the learning rate ``optim.min_lr``.
    The decay of ``inverse_sqrt`` does not depend on ``total_steps``, and stops if it reaches ``optim.min_lr``.
    ``constant`` does not decay. With warmup, the learning rate for step 0 is 0, as in Megatron and transformers.

    Raises :class:`~dpo_engine.errors.ConfigError` if a registered schedule returns an invalid factor.
    """
    warmup = warmup_steps(optim, total_steps)
    decay_steps = max(total_steps, warmup + 1)
    shared = {
        "init_lr": 0.0,
        "max_lr": optim.lr,
        "min_lr": optim.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay_steps,
        "start_wd": optim.weight_decay,
        "end_wd": optim.weight_decay,
        "wd_incr_steps": 1,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": False,
    }
    schedule = SCHEDULES[optim.schedule]
    if not isinstance(schedule, MegatronSchedule):
        try:
            found = factors(optim.schedule, optim.schedule_options, decay_steps - warmup)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return RegisteredSchedule(optimizer, factors=found, **shared)
    return OptimizerParamScheduler(
        optimizer,
        lr_decay_style=schedule.style,
        wsd_decay_steps=optim.decay_steps if optim.decay_steps is not None else max(1, total_steps // 10),
        lr_wsd_decay_style="linear",
        **shared,
    )
