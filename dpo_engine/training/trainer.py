"""Run the training loop: steps, metrics, evaluations, checkpoints, and the files that a run writes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_engine.batching.batches import Batch
from dpo_engine.checkpoint.load import load_checkpoint
from dpo_engine.checkpoint.save import Saver
from dpo_engine.errors import CheckpointError, ConfigError, EngineError, Interrupted, NumbersError, PeerError
from dpo_engine.exit_code import note_progress
from dpo_engine.faults import reach
from dpo_engine.model.policy import await_weights
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import working
from dpo_engine.reporting.pair_file import write_evaluation
from dpo_engine.reporting.sinks import Sinks, metrics_file
from dpo_engine.scoring.reference import ResidentReference
from dpo_engine.training.bad_steps import BadSteps, write_bad_step
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.evaluate import evaluation_path, held_out_evaluator, judged_pairs
from dpo_engine.training.fill_store import leave_if_asked
from dpo_engine.training.finite import require_finite
from dpo_engine.training.first_step import dead_stages, first_step_problems, known_equal, tolerance
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.model_card import card_writer
from dpo_engine.training.rank_guard import RankGuard
from dpo_engine.training.references import following, open_reference
from dpo_engine.training.run_data import RunData
from dpo_engine.training.start import Start
from dpo_engine.training.step import train_step
from dpo_engine.training.work import speed


class Trainer:
    """One run on one rank, from step 0, or from the checkpoint in ``start``, to the run's last step."""

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
        self.trained = engine.load_policy(total_steps=data.plan.num_steps)
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
        )
        held_out = data.validation is not None and len(data.validation)
        self.evaluator = held_out_evaluator(engine, data.validation, self.reference) if held_out else None

    def upcoming(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches for each of the next ``reference.ahead`` steps."""
        plan = self.data.plan
        for step in range(self.step, min(self.step + self.config.reference.ahead, plan.num_steps)):
            yield self.engine.batches(self.data.train, plan.pairs(step))

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
        require_finite(
            engine,
            self.trained,
            CheckpointError,
            f"{where}: {{}} is not finite; remove {where.name} to resume from an older checkpoint",
        )
        self.bad_steps.restore(start.found.manifest["run"]["bad_steps"])
        for line in start.lines:
            self.sinks.say(line)

    def fit(self) -> dict[str, Any]:
        """Run the remaining steps, evaluate and save when due, and export at the end. Return the run's summary.

        Raises :class:`~dpo_engine.errors.Interrupted` on all ranks, after the same step, if a signal was received or
        the time limit is near.
        """
        config, plan = self.config, self.data.plan
        world, device = self.engine.groups.world, self.engine.platform.device
        self.resume()
        self.check_ranks()
        if self.step >= plan.num_steps:
            self.sinks.say(f"nothing left to train: {self.step} of {plan.num_steps} steps are done")
        else:
            leave_before_a_step(self.engine, self.interruption)
        evaluations: dict[str, float] = {}
        metrics: dict[str, float] = {}
        unjudged = self.start.found and self.start.found.manifest["run"].get("unjudged")
        if unjudged or (config.train.eval_at_start and self.step == 0):
            evaluations = self.evaluate()
        if evaluations and self.step < plan.num_steps:
            leave_before_a_step(self.engine, self.interruption)
        while self.step < plan.num_steps:
            indices = plan.pairs(self.step)
            # Only the last stage computes the loss, so an error there is unknown to the other stages.
            with working(alone=self.engine.groups.pp.size() > 1):
                metrics = self.train_one(indices)
                reach("step")
            if self.bad_steps.causes:
                self.pass_over(indices, metrics)
            elif self.bad_steps.good == 1:
                self.check_first_step(metrics)
            last = self.step == plan.num_steps
            due = _due(self.step, config.checkpoint.save_interval)
            guarded = config.train.guard_interval
            if guarded and (last or due or _due(self.step, guarded)):
                self.check_ranks()
            if self.following and self.step % config.reference.sync_every == 0:
                self.reference.follow(self.trained.chunks, config.reference.sync_alpha)
            if self.step % config.logging.log_interval == 0 or last:
                self.sinks.log(self.step, metrics)
            # If training continues, a save that is due or running must finish before the save for a later stop begins.
            self.interruption.save_s = self.saver.took_s * (1 + (due or self.saver.in_flight))
            stop = None if last else self.interruption.agreed(world, device, after="step")
            judged = last or _due(self.step, config.train.eval_interval)
            # When stopping, and after the last step, save before an evaluation that is due. If the run ends before that
            # evaluation, the resumed run performs it first.
            unjudged = bool(judged and (stop or last) and self.evaluator)
            evaluations = {} if judged else evaluations
            if judged and self.evaluator and not unjudged:
                evaluations = self.evaluate()
                stop = self.interruption.agreed(world, device, after="evaluation")
            self.saver.advance()
            if last or stop or due:
                self.save(wait=bool(last or stop), unjudged=unjudged)
            if stop:
                note_progress()
                raise Interrupted(
                    f"{stop}: stopped after step {self.step} of {plan.num_steps} and saved a checkpoint; run the same "
                    "command to continue"
                )
        summary: dict[str, Any] = {"step": self.step, "train": metrics, "eval": evaluations}
        if self.evaluator and not evaluations:
            summary["eval"] = self.evaluate()
        without_time_limit(world, self.confirm)
        if self.evaluator:
            summary["eval_pairs"] = self.write_evaluation()
        if config.checkpoint.export:
            summary["hf"] = str(self.output / "hf")
            self.export()
        return summary

    def export(self) -> None:
        """Write the policy as a Hugging Face checkpoint to ``<train.output_dir>/hf``.

        Raises the errors of :meth:`~dpo_engine.training.engine.Engine.export`, with a way to export later.
        """
        config, identity, dims = self.config.model_dump(mode="json"), self.start.identity, self.engine.groups.dims
        card = card_writer(config, identity, dims, self.step, metrics_file(self.config))
        target = self.output / "hf"
        with self.saved_already("export"):
            self.engine.export(self.trained, target, card=card, tokenizer=identity["tokenizer"], say=self.sinks.say)

    @contextmanager
    def saved_already(self, verb: str) -> Iterator[None]:
        """Add to errors in this block that the run is saved, and that ``dpo-engine <verb>`` can do the work later."""
        try:
            yield
        except (PeerError, NumbersError):  # the same command or an earlier step is the way out
            raise
        except EngineError as error:
            *others, last = error.problems
            later = f"the checkpoint for step {self.step} is saved, and `dpo-engine {verb} RUN.yaml` writes it later"
            raise type(error)([*others, f"{last}; {later}"]) from error

    def tie(self) -> float:
        """Return ``BatchFacts.tie``: before the first update, an equal policy and reference differ only by rounding."""
        return tolerance(self.engine) if self.step == 0 and known_equal(self.engine) else 0.0

    def train_one(self, indices: np.ndarray) -> dict[str, float]:
        """Run one optimizer step over the pairs ``indices``. Return its metrics, including timing and throughput."""
        engine, pairs = self.engine, self.data.train
        started = time.perf_counter()
        batches = engine.batches(pairs, indices)
        metrics = train_step(
            self.trained,
            self.reference,
            batches,
            engine.objective,
            known=batch_facts(pairs, indices)._replace(tie=self.tie()),
            vocab_size=engine.arch.vocab_size,
            groups=engine.groups,
            refuses=self.bad_steps.refuses,
        )
        engine.platform.synchronize()
        self.step += 1
        elapsed = time.perf_counter() - started
        metrics |= {
            "skipped_steps": float(self.bad_steps.skipped),
            "step_time_s": elapsed,
            "pairs_per_s": len(indices) / elapsed,
            **speed(engine, self.reference, pairs, indices, batches, elapsed),
        }
        if engine.platform.gpu:
            metrics["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        return metrics

    def pass_over(self, indices: np.ndarray, metrics: dict[str, float]) -> None:
        """Log that the latest step was skipped as a bad step, and write its pairs to a file.

        *Collectives*: two gathers of objects over all ranks. Writing has no time limit.
        Raises :class:`~dpo_engine.errors.NumbersError`, on all ranks, after too many bad steps in a row.
        """
        pairs, world = self.data.train, self.engine.groups.world
        file = self.output / "bad_steps" / f"step_{self.step:08d}.json"
        without_time_limit(
            world,
            lambda: (
                write_bad_step(file, self.step, self.bad_steps.causes, metrics, pairs, indices)
                if world.rank() == 0
                else None
            ),
        )
        self.sinks.say(self.bad_steps.line(self.step, metrics, pairs, indices, file))

    def check_first_step(self, metrics: dict[str, float]) -> None:
        """Check the first step's loss, margin, and gradients; see :mod:`~dpo_engine.training.first_step`.

        *Collectives*: one gather of objects over all ranks.
        Raises :class:`~dpo_engine.errors.NumbersError`, which names the likely causes.
        """
        problems = first_step_problems(self.engine, metrics) + dead_stages(self.engine, self.trained)
        if problems:
            raise NumbersError(problems)

    def check_ranks(self) -> None:
        """Check that all ranks agree on settings, code, data, and weights.

        *Collectives* and errors: those of :meth:`~dpo_engine.training.rank_guard.RankGuard.check`.
        """
        await_weights(self.trained.chunks)
        models = {"policy": [chunk.module for chunk in self.trained.chunks]}
        if isinstance(self.reference, ResidentReference):
            models["reference"] = self.reference.chunks
        self.guard.check(models, step=self.step)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on all held-out pairs, log the metrics, and return them; without held-out data, return {}."""
        if self.evaluator is None:
            return {}
        metrics = self.evaluator.evaluate(self.trained.chunks, tie=self.tie())
        self.sinks.log(self.step, metrics, prefix="eval/")
        return metrics

    def save(self, *, wait: bool, unjudged: bool = False) -> None:
        """Save a checkpoint for the current step and remove old checkpoints.

        wait      return only after the checkpoint is complete
        unjudged  whether an evaluation is due but not done yet, so that a resumed run performs it first

        Raises :class:`~dpo_engine.errors.NumbersError`, without saving, if weights or optimizer state are not finite.
        """
        require_finite(
            self.engine,
            self.trained,
            NumbersError,
            f"step {self.step}: {{}} is not finite, so the step was not saved; restart from the newest checkpoint with "
            "a lower optim.lr, or with optim.clip_grad=1.0",
        )
        run = {**self.start.record(self.config, self.step), "bad_steps": self.bad_steps.state(), "unjudged": unjudged}
        self.saver.save(self.step, run)
        if wait:
            self.saver.finish()

    def write_evaluation(self) -> str:
        """Write the latest evaluation to a Parquet file with one row per pair. Return the file's path.

        *Collectives*: those of :func:`~dpo_engine.training.evaluate.judged_pairs`, and two gathers of objects. Writing
        has no time limit.
        """
        world = self.engine.groups.world
        evaluation = judged_pairs(self.engine, self.evaluator, self.data.validation, self.step)
        path = evaluation_path(self.config, self.step)

        def write() -> None:
            try:
                write_evaluation(path, evaluation)
            except ConfigError as error:  # the run chose the path, so the cause is the storage
                raise CheckpointError(error.problems) from error

        with self.saved_already("eval"):
            without_time_limit(world, write if world.rank() == 0 else lambda: None, Meter(f"writing {path}"))
        return str(path)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def leave_before_a_step(engine: Engine, interruption: Interruption) -> None:
    """Stop before the first training step if a signal was received. Called between the stages of the startup.

    *Collectives*: one MAX of a number over all ranks.
    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks if any of them received a signal.
    """
    if signal := interruption.agreed(engine.groups.world, engine.platform.device):
        raise Interrupted(f"{signal}: stopped before training a step; run the same command to start again")
