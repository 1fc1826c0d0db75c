"""The registry of learning rate schedules, and checks of a run's schedule. This module needs no Megatron.

Megatron's scheduler computes the engine's own five schedules. Every other schedule is a registered pure function
``(step, total_steps, *, options)`` that describes the learning rate after the warmup. Its first two parameters are:

step         number of steps since the warmup, from 0 to ``total_steps``
total_steps  number of steps of the run after the warmup

The function returns a factor from 0 to 1. The learning rate is ``min_lr + (lr - min_lr) * factor``. The engine itself
handles the linear warmup. Therefore ``optim.warmup_steps`` and ``optim.warmup_ratio`` work with every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.config.sections import OptimConfig
from dpo_engine.options import name_problem, option_problems, options_of, with_defaults
from dpo_engine.registry import Registry
from dpo_engine.wording import show

SCHEDULES = Registry("schedule", passes=2)

Schedule = Callable[..., float]


@dataclass(frozen=True)
class MegatronSchedule:
    """A schedule that Megatron's scheduler computes.

    style         its name in Megatron
    reads_length  whether the learning rate depends on the total number of steps
    """

    style: str
    reads_length: bool


SCHEDULES["constant"] = MegatronSchedule("constant", False)
SCHEDULES["cosine"] = MegatronSchedule("cosine", True)
SCHEDULES["linear"] = MegatronSchedule("linear", True)
SCHEDULES["wsd"] = MegatronSchedule("WSD", True)
SCHEDULES["inverse_sqrt"] = MegatronSchedule("inverse-square-root", False)


TRIED_STEPS = 10
"""Value of ``total_steps`` with which :func:`schedule_problems` tries a registered schedule before the run."""


def schedule_problems(config: Config) -> list[str]:
    """List the problems with ``optim.schedule`` and ``optim.schedule_options``."""
    name, options = config.optim.schedule, config.optim.schedule_options
    if name not in SCHEDULES:
        return [name_problem(SCHEDULES, name, f"optim.schedule={show(name)}", plugins=bool(config.plugins))]
    problems = option_problems(SCHEDULES, name, options, "optim.schedule_options")
    if not problems and not isinstance(SCHEDULES[name], MegatronSchedule):
        try:
            factors(name, options, TRIED_STEPS)
        except ValueError as error:
            return [str(error)]
        except Exception as error:  # a plugin's code can raise anything
            return [f"optim.schedule={name}: failed: {type(error).__name__}: {error}; fix the schedule"]
    return problems


def factors(name: str, options: Mapping[str, Any], total_steps: int) -> list[float]:
    """Return the factors of a registered schedule for the steps 0 to ``total_steps`` after the warmup.

    Raises ``ValueError`` if the schedule returns anything but a number from 0 to 1.
    """
    schedule, found = SCHEDULES[name], []
    options = with_defaults(options_of(SCHEDULES, name), options)
    for step in range(total_steps + 1):
        factor = schedule(step, total_steps, **options)
        if not (isinstance(factor, (int, float)) and 0 <= factor <= 1):
            raise ValueError(
                f"optim.schedule={name}: returned {show(factor)} for step {step} of {total_steps}; a schedule must "
                "return a number from 0 to 1"
            )
        found.append(float(factor))
    return found


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Return the number of warmup steps: ``warmup_steps`` or, if it is not set, ``warmup_ratio * total_steps``.

    The product is rounded up. If neither option is set, the number is 0.
    """
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    return -int(-total_steps * optim.warmup_ratio // 1) if optim.warmup_ratio else 0


def reads_length(optim: OptimConfig) -> bool:
    """Whether the learning rate for a step depends on the total number of steps.

    The engine assumes that a registered schedule depends on this number. A schedule that does not depend on it can be
    registered with ``reads_length=False``.
    """
    warmup_is_share = optim.warmup_steps is None and bool(optim.warmup_ratio)
    return getattr(SCHEDULES.get(optim.schedule), "reads_length", True) or warmup_is_share
