"""Detect, before a run, learning rate schedules with which the run would train little or nothing. Needs no Megatron."""

from __future__ import annotations

from dpo_engine.config.sections import OptimConfig
from dpo_engine.optim.schedules import SCHEDULES, MegatronSchedule, factors, warmup_steps
from dpo_engine.wording import show


def always_zero(optim: OptimConfig, total_steps: int) -> bool:
    """Whether the learning rate is 0 in every step of a run.

    With warmup, this is true only for a run of one step, because warmup starts at 0. Without warmup, this is true only
    if ``optim.min_lr`` is 0 and the schedule is a plugin's schedule whose factors are 0 in all steps.

    Raises ``ValueError`` if a plugin's schedule returns an invalid factor.
    """
    if warmup_steps(optim, total_steps):
        return total_steps == 1
    if optim.min_lr or isinstance(SCHEDULES[optim.schedule], MegatronSchedule):
        return False
    return not any(factors(optim.schedule, optim.schedule_options, total_steps)[:total_steps])


def schedule_warnings(optim: OptimConfig, total_steps: int) -> list[str]:
    """Return one warning if the learning rate is always 0, or if the warmup keeps it below ``optim.lr`` in every step.

    Otherwise, return an empty list.
    """
    key = "warmup_steps" if optim.warmup_steps is not None else "warmup_ratio"
    asked, steps = f"optim.{key}={show(getattr(optim, key))}", f"{total_steps} step{'' if total_steps == 1 else 's'}"
    warmup = warmup_steps(optim, total_steps)
    if total_steps and always_zero(optim, total_steps):
        cause = f"{asked}: warmup starts at 0, so" if warmup else f"optim.schedule={optim.schedule}:"
        way_out = "remove the warmup, or train more steps" if warmup else "use another schedule, or set optim.min_lr"
        return [f"{cause} the learning rate is 0 in every step of this run ({steps}); {way_out}"]
    if warmup and warmup >= total_steps:
        return [f"{asked}: the run has {steps}, so the learning rate never reaches optim.lr; shorten the warmup"]
    return []
