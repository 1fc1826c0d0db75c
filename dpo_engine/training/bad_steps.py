"""Detect steps with bad numbers (non-finite values or spikes), and make all ranks skip the update of a bad step."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpo_engine.config.sections import BadStepsConfig
from dpo_engine.data.dataset import PairDataset
from dpo_engine.errors import NumbersError
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.reporting.pair_file import write_json

CAUSES = {
    "reference": "the reference's log-probabilities are not finite",
    "policy": "the policy's log-probabilities are not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
    "loss spike": "the loss spiked",
    "gradient spike": "the gradient norm spiked",
}
"""Causes of a bad step, and the text for each cause in logs and files."""
JUDGED = {"loss": "loss spike", "grad_norm": "gradient spike"}
"""Metrics that are checked for spikes, and the cause (a key of :data:`CAUSES`) to report for each metric."""
NAMED = 3
"""Maximum number of pairs that the log line about a bad step names. The step's JSON file lists all of its pairs."""


class BadSteps:
    """Check every step before its update, and keep the statistics that spike detection needs.

    asked     the ``bad_steps`` section of the configuration
    group     the group of all ranks; if one rank has a bad number, all ranks skip the update
    skipped   number of bad steps so far
    good      number of good steps so far, which is also the number of optimizer updates
    in_a_row  number of consecutive bad steps, up to the latest step
    causes    keys of :data:`CAUSES` that apply to the latest step; empty for a good step
    """

    def __init__(self, asked: BadStepsConfig, group: dist.ProcessGroup, device: torch.device):
        self.asked = asked
        self.group = group
        self.device = device
        self.skipped = self.good = self.in_a_row = 0
        self.causes: list[str] = []
        self._good = {name: deque[float](maxlen=asked.spike_window) for name in JUDGED}

    def refuses(self, metrics: Mapping[str, float]) -> bool:
        """Whether to skip the update of a step with these metrics. All ranks return the same value.

        metrics  the step's metrics, including ``grad_norm``

        *Collectives*: one MAX of ``len(CAUSES)`` flags over all ranks. The reduction is needed because a wrong loss or
        gradient can occur on only some of the ranks that share a model copy.
        """
        mine = self._causes(metrics)
        flags = torch.zeros(len(CAUSES), device=self.device)
        for index, cause in enumerate(CAUSES):
            if cause in mine:
                flags[index] = 1.0  # a fill on the device; a copy from the host would make the host wait
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        self.causes = [cause for cause, found in zip(CAUSES, flags.tolist(), strict=True) if found]
        if self.causes:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.good += 1
            self.in_a_row = 0
            for name, values in self._good.items():
                values.append(metrics[name])
        return bool(self.causes)

    def _causes(self, metrics: Mapping[str, float]) -> list[str]:
        wrong = {name for name, value in metrics.items() if not math.isfinite(value)}
        if wrong:
            policy = any(name.startswith("logps/") for name in wrong)
            reference = not policy and any(name.startswith("displacement/") for name in wrong)
            found = {"reference": reference, "policy": policy, "gradient": "grad_norm" in wrong}
            found["loss"] = bool(wrong - {"grad_norm"}) and not policy and not reference
            return [cause for cause in CAUSES if found.get(cause)]
        return [cause for name, cause in JUDGED.items() if self._spike(metrics[name], self._good[name])]

    def _spike(self, value: float, before: Sequence[float]) -> bool:
        """Whether ``value`` is more than ``spike_sigma`` standard deviations above the mean of previous good steps.

        False if ``spike_sigma`` is null, if the number of known good steps is less than half of ``spike_window``, or if
        the values of all known good steps are equal.

        *Source*: OLMo 2 (arXiv 2501.00656) skips a step whose value is more than 6 standard deviations above the mean
        of the last 128 steps.
        """
        if self.asked.spike_sigma is None or 2 * len(before) < self.asked.spike_window:
            return False
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in before) / len(before))
        return deviation > 0 and value > mean + self.asked.spike_sigma * deviation

    def state(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint: the counts, and the metrics of recent good steps."""
        return {
            "skipped": self.skipped,
            "good": self.good,
            "in_a_row": self.in_a_row,
            **{name: list(values) for name, values in self._good.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that :meth:`state` returned; ``bad_steps.spike_window`` may have changed since."""
        self.skipped, self.good, self.in_a_row = (int(state[name]) for name in ("skipped", "good", "in_a_row"))
        for name, values in self._good.items():
            values.extend(state[name])

    def report(
        self, step: int, metrics: Mapping[str, float], pairs: PairDataset, indices: np.ndarray, folder: Path
    ) -> str:
        """Write the pairs of the latest step, which was bad, to a file in ``folder``. Return a line for the log.

        indices  the step's pairs, as indices in ``pairs``

        *Collectives*: two all-gathers of objects over all ranks. Writing has no time limit.
        Raises :class:`~dpo_engine.errors.NumbersError`, on all ranks, after ``bad_steps.stop_after`` bad steps in a
        row.
        """
        file = folder / f"step_{step:08d}.json"

        def write() -> None:
            if self.group.rank() == 0:
                write_bad_step(file, step, self.causes, metrics, pairs, indices)

        without_time_limit(self.group, write, Meter(f"writing {file}"))
        places = [pairs.place(int(index)) for index in indices]
        return self._line(step, metrics, places, file)

    def _line(self, step: int, metrics: Mapping[str, float], places: Sequence[str], file: Path) -> str:
        """Return the log line about the latest step, or raise an error if too many steps in a row were bad."""
        why = " and ".join(CAUSES[cause] for cause in self.causes)
        named = ", ".join(places[:NAMED]) + (f" and {len(places) - NAMED} more" if len(places) > NAMED else "")
        found = f"{why} (loss {metrics['loss']:.4g}, grad norm {metrics['grad_norm']:.4g})"
        if self.in_a_row >= self.asked.stop_after:
            raise NumbersError(
                f"step {step}: {found}; bad steps in a row: {self.in_a_row}; the limit bad_steps.stop_after is reached"
                f"; inspect the pairs listed in {file.parent}, or lower optim.lr"
            )
        return (
            f"step {step} skipped: {found}; pairs in this step: {named}, listed in {file}; bad steps in a "
            f"row: {self.in_a_row} (the run stops at {self.asked.stop_after})"
        )


def write_bad_step(
    file: Path, step: int, causes: Sequence[str], metrics: Mapping[str, float], pairs: PairDataset, indices: np.ndarray
) -> None:
    """Write a JSON file with a bad step's causes, its metrics, and the `file:line` and ID of each of its pairs."""
    named = [{"place": pairs.place(int(index)), "id": pairs[int(index)].digest} for index in indices]
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    write_json(file, {"step": step, "causes": [CAUSES[cause] for cause in causes], "metrics": values, "pairs": named})
