"""Check the intervals that a run gives as parts of an epoch."""

import math
from fractions import Fraction

from dpo_engine.config.rules import value_at
from dpo_engine.config.run import Config
from dpo_engine.config.section import interval_of

INTERVALS = ("train.eval_interval", "checkpoint.save_interval")


def interval_problems(config: Config, steps_per_epoch: int) -> list[str]:
    """Return an error line for each interval that is shorter than one step."""
    found = []
    for key in INTERVALS:
        interval = interval_of(value := value_at(config, key))
        if isinstance(interval, Fraction) and interval * steps_per_epoch < 1:
            least = math.ceil(Fraction(10000, steps_per_epoch)) / 10000
            steps = f"{steps_per_epoch} step{'s' * (steps_per_epoch > 1)}"
            found.append(
                f"{key}={value}: is less than one step, because an epoch has {steps}; set at least {least:g}epoch, or "
                "1 for every step"
            )
    return found


def intervals_in_steps(config: Config, steps_per_epoch: int) -> list[str]:
    """Return a line for each interval that is a part of an epoch, with its length in steps."""
    return [
        f"{key}: {value_at(config, key)} is {float(interval * steps_per_epoch):.4g} steps"
        for key in INTERVALS
        if isinstance(interval := interval_of(value_at(config, key)), Fraction)
    ]
