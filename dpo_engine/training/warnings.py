"""Warn, in the log, about runs that continue without an error, but whose training goes wrong."""

from __future__ import annotations

import math

from dpo_engine.data.dataset import shared_pairs
from dpo_engine.optim.forecast import schedule_warnings
from dpo_engine.reporting.sinks import metrics_file, read_metrics
from dpo_engine.training.callbacks import Callback, Run

STEPS = 10
"""Number of consecutive steps without a gradient, or with the same loss, after which a warning is logged.

One such step can be correct: a batch in which every pair has satisfied a hinge loss has no gradient."""


class Warnings(Callback):
    """Warnings, each logged once with a way out: a schedule that trains little or nothing, held-out pairs that are also
    training pairs, steps without a gradient, a constant loss, and a policy that is no longer a language model.

    For the last warning, the policy's mean log-probability per token of the chosen responses is compared with
    ``-ln(vocabulary size)``, the log-probability under a uniform distribution. A language model gives meaningful text a
    higher log-probability. A policy whose mean is below this value has been pushed away from language, as in
    likelihood displacement (arXiv 2410.08847). Rewards and accuracy do not show this failure, and can look perfect. A
    model with random weights starts near this value. The warning therefore also requires that the log-probability is
    more than `FALL` nats lower than at the start of the run.
    """

    FALL = 1.0

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.first: float | None = None
        self.losses: list[float] = []
        self.still = 0

    def on_start(self, run: Run) -> None:
        if run.step and run.engine.groups.world.rank() == 0:  # a resumed run continues the log
            lines = read_metrics(metrics_file(run.config))
            self.first = next((line["sft_loss"] for line in lines if line.get("sft_loss") is not None), None)
        for line in schedule_warnings(run.config.optim, run.data.plan.num_steps):
            self._warn(run, "schedule", line)
        held_out = run.data.validation
        if held_out is not None and run.engine.groups.world.rank() == 0:  # only rank 0 prints
            count = shared_pairs(run.data.train, held_out)
            if count:
                self._warn(
                    run,
                    "held-out",
                    f"held-out pairs: {count:,} of {len(held_out):,} are also training pairs, so evaluations look "
                    "better than they should; remove these pairs from data.train or data.validation",
                )

    def on_step(self, run: Run, metrics: dict[str, float]) -> None:
        self.still = self.still + 1 if metrics["grad_norm"] == 0 else 0
        self.losses = [*self.losses[1 - STEPS :], metrics["loss"]]
        if self.still == STEPS:
            self._warn(
                run,
                "gradient",
                f"grad_norm: 0 in the last {STEPS} steps, so the loss no longer trains the weights; every pair may "
                "have satisfied the loss: end the run here, or use a loss without a flat region, such as sigmoid",
            )
        elif self.still == 0 and len(self.losses) == STEPS and len(set(self.losses)) == 1:
            self._warn(
                run,
                "loss",
                f"loss: exactly {metrics['loss']:.6g} in the last {STEPS} steps; check that the records differ, and "
                "that optim.lr is large enough for the weights to change",
            )
        self._check_language(run, metrics)

    def on_eval(self, run: Run, metrics: dict[str, float]) -> None:
        self._check_language(run, metrics)

    def _check_language(self, run: Run, metrics: dict[str, float]) -> None:
        now, uniform = metrics["sft_loss"], math.log(run.engine.arch.vocab_size)
        if self.first is None:
            self.first = now
        if now > max(uniform, self.first + self.FALL):
            self._warn(
                run,
                "language",
                f"logps/chosen: {-now:.2f} nats per token after step {run.step} ({-self.first:.2f} at the "
                f"start), below a uniform distribution's {-uniform:.2f}, so the policy is no longer a language model; "
                "lower optim.lr, raise loss.beta, or add a likelihood term (loss mix with sft)",
            )

    def _warn(self, run: Run, about: str, line: str) -> None:
        if about not in self.said:
            self.said.add(about)
            run.sinks.say(f"warning: {line}")
