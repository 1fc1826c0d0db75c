"""Steps with bad numbers: which they are, decided by all ranks as one, before anything is updated."""

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
from dpo_engine.reporting.pair_file import write_json

CAUSES = {
    "reference": "the reference's log-probabilities are not finite",
    "policy": "the policy's log-probabilities are not finite",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
    "loss spike": "the loss is a spike",
    "gradient spike": "the gradient norm is a spike",
}
JUDGED = {"loss": "loss spike", "grad_norm": "gradient spike"}
NAMED = 3
"""Pairs of a bad batch that the line in the log names; its file names all."""


class BadSteps:
    """Judges every step of a run before its update, and remembers what it needs to judge the next.

    asked    ``bad_steps`` of the run
    group    all ranks: one that sees a bad number makes the step a bad one on all
    skipped  bad steps so far
    good     good steps so far: the updates that Adam has made
    in_a_row the latest bad steps without a good one after them
    causes   keys of :data:`CAUSES` that were found of the latest step; empty when it was good
    """

    def __init__(self, asked: BadStepsConfig, group: dist.ProcessGroup, device: torch.device):
        self.asked = asked
        self.group = group
        self.device = device
        self.skipped = self.good = self.in_a_row = 0
        self.causes: list[str] = []
        self._good = {name: deque[float](maxlen=asked.spike_window) for name in JUDGED}

    def refuses(self, metrics: Mapping[str, float]) -> bool:
        """Whether the step with these metrics, ``grad_norm`` among them, is to be skipped; the same on every rank.

        *Collectives*: one MAX of ``len(CAUSES)`` flags over all ranks. Losses, or gradients, need not be alike on the
        ranks of one model copy where they are wrong.
        """
        mine = self._causes(metrics)
        flags = torch.tensor([float(cause in mine) for cause in CAUSES], device=self.device)
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
        """Whether ``value`` is too far over the mean of the good steps before it.

        *Source*: OLMo 2 (arXiv 2501.00656) skips beyond 6 deviations of the last 128 steps.
        """
        if self.asked.spike_sigma is None or 2 * len(before) < self.asked.spike_window:
            return False
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in before) / len(before))
        return deviation > 0 and value > mean + self.asked.spike_sigma * deviation

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the counts and the good steps' values."""
        return {
            "skipped": self.skipped,
            "good": self.good,
            "in_a_row": self.in_a_row,
            **{name: list(values) for name, values in self._good.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, perhaps with another window."""
        self.skipped, self.good, self.in_a_row = (int(state[name]) for name in ("skipped", "good", "in_a_row"))
        for name, values in self._good.items():
            values.extend(state[name])

    def line(self, step: int, metrics: Mapping[str, float], pairs: PairDataset, indices: np.ndarray, file: Path) -> str:
        """What is said of the latest step, a bad one, whose pairs ``indices`` are in ``file``.

        Raises :class:`~dpo_engine.errors.NumbersError` when as many were bad in a row as end the run.
        """
        why = " and ".join(CAUSES[cause] for cause in self.causes)
        places = [pairs.place(int(index)) for index in indices[:NAMED]]
        more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
        found = f"{why} (loss {metrics['loss']:.4g}, grad norm {metrics['grad_norm']:.4g})"
        if self.in_a_row >= self.asked.stop_after:
            raise NumbersError(
                f"step {step}: {found}; bad steps in a row: {self.in_a_row} (bad_steps.stop_after). Look at the pairs "
                f"in {file.parent}, or lower optim.lr or optim.clip_grad"
            )
        return (
            f"step {step} skipped: {found}; its pairs: {', '.join(places)}{more}, all in {file}; bad steps in a row: "
            f"{self.in_a_row} of {self.asked.stop_after} that end the run"
        )


def write_bad_step(
    file: Path, step: int, causes: Sequence[str], metrics: Mapping[str, float], pairs: PairDataset, indices: np.ndarray
) -> None:
    """Write why a step was skipped, its metrics and all of its pairs, by `file:line` and id."""
    named = [{"place": pairs.place(int(index)), "id": pairs[int(index)].digest} for index in indices]
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    write_json(file, {"step": step, "causes": [CAUSES[cause] for cause in causes], "metrics": values, "pairs": named})
