"""Run the training loop: steps, metrics, evaluations, checkpoints, and the files that a run writes."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpo_engine.batching.batches import Batch
from dpo_engine.checkpoint.load import load_checkpoint
from dpo_engine.checkpoint.save import Saver
from dpo_engine.config.section import interval_of
from dpo_engine.errors import CheckpointError, Interrupted, NumbersError
from dpo_engine.exit_code import note_progress
from dpo_engine.faults import reach
from dpo_engine.model.policy import await_weights
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import working
from dpo_engine.platform.ranges import part
from dpo_engine.reporting.sinks import Sinks, metrics_file
from dpo_engine.scoring.reference import ResidentReference, SharedReference
from dpo_engine.training.bad_steps import BadSteps
from dpo_engine.training.callbacks import setting, still_stopped
from dpo_engine.training.enabled_callbacks import enabled_callbacks
from dpo_engine.training.engine import Engine
from dpo_engine.training.evaluate import held_out_evaluator
from dpo_engine.training.evaluation_files import record_evaluation
from dpo_engine.training.fill_store import leave_if_asked
from dpo_engine.training.finite import require_finite
from dpo_engine.training.first_step import known_equal, require_first_step, tolerance
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.next_step import OneAhead, StepData, one_ahead, step_data
from dpo_engine.training.rank_guard import RankGuard
from dpo_engine.training.references import following, open_reference
from dpo_engine.training.results import write_results
from dpo_engine.training.run_data import RunData
from dpo_engine.training.start import Start, leave_before_a_step, pairs_seen, stopped_before_a_step
from dpo_engine.training.step import train_step
from dpo_engine.training.work import speed
from dpo_engine.wording import data_size


class Trainer:
    """One run on one rank. The run begins at step 0 or at the checkpoint in ``start``, and ends at its last step.

    step        number of steps done
    pairs_seen  number of pairs in these steps
    stopped     record of why the run ended early, as saved in checkpoints; None if the run did not end early
    """

    def __init__(
        self,
        engine: Engine,
        data: RunData,
        start: Start,
        guard: RankGuard,
        sinks: Sinks,
        interruption: Interruption,
        *,
        confirm: Callable[[], None] = lambda: None,
    ):
        """Load the policy and open the reference.

        confirm  raises an error if another run has taken over train.output_dir; called before files are written
        """
        self.engine = engine
        self.config = engine.config
        self.data = data
        self.start = start
        self.guard = guard
        self.sinks = sinks
        self.interruption = interruption
        self.confirm = confirm
        self.output = Path(engine.config.train.output_dir)
        self.step = 0
        self.pairs_seen = 0
        self.trained = engine.load_policy(total_steps=data.plan.num_steps)
        self.step_data = lambda step: step_data(engine, data.train, data.plan.pairs(step))
        self.steps = OneAhead(self.step_data, data.plan.num_steps)
        self.bad_steps = BadSteps(self.config.bad_steps, engine.groups.world, engine.platform.device)
        self.reference = open_reference(
            engine,
            self.trained.chunks,
            pairs=data.all_pairs,
            upcoming=self.upcoming,
            say=sinks.say,
            between=partial(leave_if_asked, engine, interruption),
        )
        self.following = following(self.reference, engine.config.reference)
        found = start.found
        self.saver = Saver(
            engine.config.checkpoint_dir,
            self.trained,
            engine.arch,
            engine.groups,
            start.identity,
            keep_last=engine.config.checkpoint.keep_last,
            keep_best=engine.config.checkpoint.keep_best,
            asynchronous=engine.config.checkpoint.async_save,
            device=engine.platform.device,
            history=metrics_file(engine.config),
            following=self.following,
            passed_over=found.passed_over if found else (),
            confirm=confirm,
            saved=self.on_saved,
        )
        self.callbacks = enabled_callbacks(self.config)
        self.stopped: dict[str, Any] | None = None
        held_out = data.validation is not None and len(data.validation)
        self.evaluator = held_out_evaluator(engine, data.validation, self.reference) if held_out else None

    def upcoming(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches for each of the next ``reference.ahead`` steps."""
        stop = min(self.step + self.config.reference.ahead, self.data.plan.num_steps)
        yield from map(StepData.batches, one_ahead(self.step_data, range(self.step, stop)))

    def resume(self) -> None:
        """Load the checkpoint from which the run resumes, if there is one."""
        start, engine = self.start, self.engine
        if start.found is None:
            return
        followers = self.following if start.keeps_following else ()
        random = start.keeps_random
        load_checkpoint(start.found, self.trained, engine.arch, engine.groups, following=followers, random=random)
        self.step = start.step
        where = start.found.directory
        problem = f"{where}: {{}} is not finite; remove {where.name} to resume from an older checkpoint"
        require_finite(engine, self.trained, CheckpointError, problem)
        run = start.found.manifest["run"]
        self.bad_steps.restore(run["bad_steps"])
        self.pairs_seen = pairs_seen(start.found.manifest)
        self.stopped = still_stopped(run.get("stopped"), self.config)
        for line in start.lines:
            self.sinks.say(line)

    def fit(self) -> dict[str, Any]:
        """Run the remaining steps, evaluate and save when due, and export at the end. Return the run's summary.

        Raises :class:`~dpo_engine.errors.Interrupted` on all ranks, after the same step, if a signal was received or
        the limit ``train.save_by`` is near.
        """
        self.resume()
        self.check_ranks()
        try:
            self.callbacks.start(self)
            summary = self.run_steps()
        finally:
            self.steps.close()
            self.callbacks.end(self)
        without_time_limit(self.engine.groups.world, self.confirm, Meter("looking at the lease of train.output_dir"))
        return summary | write_results(self, self.evaluator, self.start.identity)

    def run_steps(self) -> dict[str, Any]:
        """Run the remaining steps, and evaluate after the last step. Return the last step's metrics and evaluation."""
        config, plan = self.config, self.data.plan
        if self.step >= plan.num_steps or self.stopped:
            line = f"nothing left to train: {self.step} of {plan.num_steps} steps are done"
            if self.stopped:
                line += "; {by} ended the run ({reason}); change {by} to continue".format(**self.stopped)
            self.sinks.say(line)
        else:
            leave_before_a_step(self.engine, self.interruption)
        evaluations: dict[str, float] = {}
        metrics: dict[str, float] = {}
        unjudged = self.start.found and self.start.found.manifest["run"].get("unjudged")
        if unjudged or (config.train.eval_at_start and self.step == 0):
            evaluations = self.evaluate()
            self.saver.judged()
        if evaluations and not self.last:
            if self.step == 0:
                leave_before_a_step(self.engine, self.interruption)
            # The checkpoint lacked this evaluation. If a callback ends the run after it, `agree` sets `stopped`.
            elif signal := self.agree(None):
                raise stopped_before_a_step(signal)
        while self.step < plan.num_steps and not self.stopped:
            metrics = self.take_step()
            due = plan.due(self.step, interval_of(config.checkpoint.save_interval))
            judged = self.last or plan.due(self.step, interval_of(config.train.eval_interval))
            may_save = due or bool(judged and config.checkpoint.keep_best)  # keep_best also saves the best steps
            # If a save is due or running, the save of a later stop comes second, so plan time for both saves.
            self.interruption.save_s = self.saver.took_s * (1 + (may_save or self.saver.in_flight))
            stop = None if self.last else self.agree("step")
            guarded = config.train.guard_interval
            if guarded and (self.last or may_save or plan.due(self.step, guarded)):
                self.check_ranks()
            if self.following and self.step % config.reference.sync_every == 0:
                self.reference.follow(self.trained.chunks, config.reference.sync_alpha)
            if self.step % config.logging.log_interval == 0 or self.last:
                self.sinks.log(self.step, metrics)
            # When stopping, and after the last step, save before an evaluation that is due. If the process ends before
            # that evaluation, the resumed run performs it first.
            unjudged = bool(judged and (stop or self.last) and self.evaluator)
            evaluations = {} if judged else evaluations
            if judged and self.evaluator and not unjudged:
                evaluations = self.evaluate()
                stop = self.agree("evaluation")
                due = due or (may_save and self.saver.is_best(self.step))
            self.saver.advance()
            if self.last or stop or due:
                self.save(wait=bool(self.last or stop), unjudged=unjudged)
            if stop:
                note_progress()
                raise Interrupted(
                    f"{stop}: stopped after step {self.step} of {plan.num_steps} and saved a checkpoint; run the same "
                    "command to continue"
                )
        if self.evaluator and not evaluations:
            evaluations = self.evaluate()
        self.saver.judged()
        return {"step": self.step, "train": metrics, "eval": evaluations}

    @property
    def last(self) -> bool:
        """Whether the run ends after the current step."""
        return self.step == self.data.plan.num_steps or self.stopped is not None

    def agree(self, after: str | None) -> str | None:
        """Agree with all ranks on whether a signal or the time limit stops the run, or a callback ends it early.

        after   "step" or "evaluation", whichever has just finished; None: do not check the time limit

        Returns the reason to stop, or None. If a callback has asked to end the run, set ``stopped``.

        *Collectives*: one MAX of a number over all ranks; one all-gather of objects if the run stops or ends early.
        """
        groups, interruption = self.engine.groups, self.interruption
        interruption.finish = bool(self.callbacks.asked)
        stop = interruption.agreed(groups.world, self.engine.platform.device, after=after)
        # A signal or the time limit hides a callback's request in the MAX, but the checkpoint must record the request.
        asked: list[Any] = [None] * groups.world.size()
        if interruption.finish or stop:
            dist.all_gather_object(asked, self.callbacks.asked, group=groups.world)
        if request := next((request for request in asked if request), None):
            by, reason = request
            self.stopped = {"by": by, "setting": setting(self.config, by), "reason": reason}
            self.sinks.say(f"the run ends after step {self.step} of {self.data.plan.num_steps}: {by}: {reason}")
        return stop

    def tie(self) -> float:
        """Return ``BatchFacts.tie``: at step 0, a rounding tolerance if policy and reference are equal; otherwise 0."""
        return tolerance(self.engine) if self.step == 0 and known_equal(self.engine) else 0.0

    def take_step(self) -> dict[str, float]:
        """Run and check one optimizer step, and call the callbacks. Return the step's metrics."""
        indices = self.data.plan.pairs(self.step)
        with working(alone=self.engine.groups.waits_for_others), part("step"):
            metrics = self.train_one(indices)
            reach("step")
        if self.bad_steps.causes:
            files = self.output / "bad_steps"
            self.sinks.say(self.bad_steps.report(self.step, metrics, self.data.train, indices, files))
        elif self.bad_steps.good == 1:
            require_first_step(self.engine, self.trained, metrics)
        self.callbacks.step(self, metrics)
        return metrics

    def train_one(self, indices: np.ndarray) -> dict[str, float]:
        """Run one optimizer step over the pairs ``indices``. Return its metrics, including timing and throughput."""
        engine, started = self.engine, time.perf_counter()
        with part("batches"):
            data = self.steps.take(self.step)
            batches = data.batches()
            self.steps.begin(self.step + 1)
        metrics = train_step(
            self.trained,
            self.reference,
            batches,
            engine.objective,
            known=data.known._replace(tie=self.tie()),
            vocab_size=engine.arch.vocab_size,
            groups=engine.groups,
            refuses=self.bad_steps.refuses,
            count_zeros=self.config.logging.num_zeros,
        )
        engine.platform.synchronize()
        self.step += 1
        self.pairs_seen += len(indices)
        elapsed = time.perf_counter() - started
        metrics |= {
            "epoch": float(self.data.plan.epochs_done(self.step)),
            "pairs_seen": float(self.pairs_seen),
            "time": time.time(),
            "skipped_steps": float(self.bad_steps.skipped),
            "step_time_s": elapsed,
            "pairs_per_s": len(indices) / elapsed,
            **speed(engine, self.reference, data.work, elapsed),
        }
        if engine.platform.gpu:
            metrics["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
            metrics["reserved_memory_bytes"] = float(torch.cuda.max_memory_reserved())
        return metrics

    def check_ranks(self) -> None:
        """Check that all ranks agree on settings, code, data, and weights.

        *Collectives* and errors: those of :meth:`~dpo_engine.training.rank_guard.RankGuard.check`.
        """
        await_weights(self.trained.chunks)
        models = {"policy": [chunk.module for chunk in self.trained.chunks]}
        if isinstance(self.reference, ResidentReference):
            models["reference"] = self.reference.chunks
        elif isinstance(self.reference, SharedReference) and self.reference.start:
            models["reference"] = self.reference.start
        self.guard.check(models, step=self.step)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on all held-out pairs, log the metrics, and return them; without held-out data, return {}."""
        if self.evaluator is None:
            return {}
        with part("evaluate"):
            metrics = self.evaluator.evaluate(self.trained.chunks, tie=self.tie())
        self.callbacks.evaluated(self, metrics)
        self.sinks.log(self.step, metrics, prefix="eval/")
        record_evaluation(self)
        return metrics

    def save(self, *, wait: bool, unjudged: bool = False) -> None:
        """Save a checkpoint for the current step and remove old checkpoints.

        wait      whether to return only after the checkpoint is complete
        unjudged  whether an evaluation is due but not done yet; a resumed run then performs this evaluation first

        Raises :class:`~dpo_engine.errors.NumbersError`, without saving, if weights or optimizer state are not finite.
        """
        require_finite(
            self.engine,
            self.trained,
            NumbersError,
            f"step {self.step}: {{}} is not finite, so the step was not saved; restart from the newest checkpoint with "
            "a lower optim.lr, or with optim.clip_grad=1.0",
        )
        run = self.start.record(self.config, self.step)
        run |= {"bad_steps": self.bad_steps.state(), "unjudged": unjudged, "stopped": self.stopped}
        run["pairs_seen"] = self.pairs_seen
        with part("save"):
            self.saver.save(self.step, run)
            if wait:
                self.saver.finish()

    def on_saved(self, directory: Path) -> None:
        """Log that the checkpoint in ``directory`` is complete, and call the callbacks."""
        if self.engine.groups.world.rank() == 0:
            size = sum(file.stat().st_size for file in directory.glob("*"))
            where = directory.relative_to(self.output)
            self.sinks.say(f"saved {where} ({data_size(size)} in {self.saver.took_s:.1f} s)")
        self.callbacks.saved(self, directory)
