"""The loop: batches, step, metrics, checkpoint. Owns time, and the files of a run."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_engine.config import Config
from dpo_engine.data.batches import Batch
from dpo_engine.errors import CheckpointError, Interrupted, NumbersError
from dpo_engine.evaluation.pair_file import write_evaluation
from dpo_engine.faults import reach
from dpo_engine.platform.device import peak_flops
from dpo_engine.platform.parallel import together, working
from dpo_engine.training.bad_steps import BadSteps, write_bad_step
from dpo_engine.training.checkpoint import latest_step, load_checkpoint, read_manifest, save_checkpoint, step_directory
from dpo_engine.training.engine import Engine, batch_facts, pair_flops, token_count
from dpo_engine.training.first_step import dead_stages, first_step_problems
from dpo_engine.training.fitness import require_finite
from dpo_engine.training.held_out import evaluation_path, held_out_evaluator, judged_pairs
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.optimizer_state import set_adam_step
from dpo_engine.training.reference_modes import following, open_reference, reference_identity
from dpo_engine.training.run_data import RunData, open_data
from dpo_engine.training.sinks import Sinks, open_sinks
from dpo_engine.training.step import train_step
from dpo_engine.training.store_filling import leave_if_asked


class Trainer:
    """One run on one rank, from its first step to its last."""

    def __init__(self, engine: Engine, data: RunData, sinks: Sinks, interruption: Interruption):
        self.engine = engine
        self.config = engine.config
        self.data = data
        self.sinks = sinks
        self.interruption = interruption
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
        self.identity = identity(engine, data)
        held_out = data.validation is not None and len(data.validation)
        self.evaluator = held_out_evaluator(engine, data.validation, self.reference) if held_out else None

    def upcoming(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the coming steps, as far ahead as ``reference.ahead`` says."""
        plan = self.data.plan
        for step in range(self.step, min(self.step + self.config.reference.ahead, plan.num_steps)):
            yield self.engine.batches(self.data.train, plan.pairs(step))

    def resume(self, step: int) -> None:
        """Continue from this run's checkpoint of ``step``; 0 is the beginning."""
        if step == 0:
            return
        self.step = load_checkpoint(
            self.output / "checkpoints",
            step,
            self.trained,
            self.engine.arch,
            self.engine.groups,
            self.identity,
            following=self.following,
        )
        where = step_directory(self.output / "checkpoints", step)
        require_finite(
            self.engine,
            self.trained,
            CheckpointError,
            f"{where}: {{}} is not finite; remove {where.name} to fall back to an older one",
        )
        manifest = read_manifest(self.output / "checkpoints", step, self.identity)
        self.bad_steps.restore(manifest["identity"]["bad_steps"])
        set_adam_step(self.trained, self.bad_steps.good)
        self.sinks.say(f"resumed after step {self.step}")

    def fit(self, start: int) -> dict[str, Any]:
        """Run every step after ``start``, evaluate and save when due, export at the end. Returns the run's summary.

        Raises :class:`~dpo_engine.errors.Interrupted`, on all ranks after the same step, when a signal asked for it.
        """
        config, plan = self.config, self.data.plan
        world, device = self.engine.groups.world, self.engine.platform.device
        self.resume(start)
        if self.step >= plan.num_steps:
            self.sinks.say(f"nothing left to train: step {self.step} of {plan.num_steps} is done")
        evaluations: dict[str, float] = {}
        metrics: dict[str, float] = {}
        if config.train.eval_at_start and self.step == 0:
            self.evaluate()
        if self.step < plan.num_steps:
            leave_before_a_step(self.engine, self.interruption)
        while self.step < plan.num_steps:
            indices = plan.pairs(self.step)
            with working():
                metrics = self.train_one(indices)
                reach("step")
            if self.bad_steps.causes:
                self.pass_over(indices, metrics)
            elif self.bad_steps.good == 1:
                self.check_first_step(metrics)
            if self.following and self.step % config.reference.sync_every == 0:
                self.reference.follow(self.trained.chunks, config.reference.sync_alpha)
            if self.step % config.logging.log_interval == 0 or self.step == plan.num_steps:
                self.sinks.log(self.step, metrics)
            last = self.step == plan.num_steps
            if last or _due(self.step, config.train.eval_interval):
                evaluations = self.evaluate()
            stop = None if last else self.interruption.agreed(world, device, after_step=True)
            if last or stop or _due(self.step, config.checkpoint.save_interval):
                self.save()
            if stop:
                raise Interrupted(
                    f"{stop}: stopped after step {self.step} of {plan.num_steps}, which is saved; the same command "
                    "continues from there"
                )
        summary: dict[str, Any] = {"step": self.step, "train": metrics, "eval": evaluations}
        if self.evaluator and not evaluations:
            summary["eval"] = self.evaluate()
        if self.evaluator:
            summary["eval_pairs"] = self.write_evaluation()
        if config.checkpoint.export:
            reach("export")
            self.engine.export(self.trained, self.output / "hf")
            summary["hf"] = str(self.output / "hf")
        return summary

    def train_one(self, indices: np.ndarray) -> dict[str, float]:
        """One optimiser step over the pairs ``indices``; adds this rank's clock and rates to the step's metrics."""
        engine, pairs = self.engine, self.data.train
        started = time.perf_counter()
        metrics = train_step(
            self.trained,
            self.reference,
            engine.batches(pairs, indices),
            engine.objective,
            known=batch_facts(pairs, indices),
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
            "tokens_per_s": token_count(pairs, indices) / elapsed,
        }
        if engine.platform.gpu:
            metrics["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
            if peak := peak_flops(engine.platform.device):
                facts = engine.objective.facts  # a backward pass costs two forward passes
                passes = 3 + facts.needs_reference + facts.couples_pairs
                work = passes * pair_flops(engine.arch, pairs, indices)
                metrics["mfu"] = work / elapsed / (peak * engine.groups.dims.world)
        return metrics

    def pass_over(self, indices: np.ndarray, metrics: dict[str, float]) -> None:
        """Say that the step's numbers were bad, and write down its pairs.

        *Collectives*: one gather of objects over all ranks.
        Raises :class:`~dpo_engine.errors.NumbersError`, on all ranks, when too many steps in a row were bad.
        """
        pairs, world = self.data.train, self.engine.groups.world
        file = self.output / "bad_steps" / f"step_{self.step:08d}.json"
        together(
            world,
            lambda: (
                write_bad_step(file, self.step, self.bad_steps.causes, metrics, pairs, indices)
                if world.rank() == 0
                else None
            ),
        )
        self.sinks.say(self.bad_steps.line(self.step, metrics, pairs, indices, file))

    def check_first_step(self, metrics: dict[str, float]) -> None:
        """What must hold of any first step: see :mod:`~dpo_engine.training.first_step`.

        *Collectives*: one gather of objects over all ranks.
        Raises :class:`~dpo_engine.errors.NumbersError` naming the likely causes.
        """
        problems = first_step_problems(self.engine, metrics) + dead_stages(self.engine, self.trained)
        if problems:
            raise NumbersError(problems)

    def evaluate(self) -> dict[str, float]:
        """Metrics over every held-out pair; an empty dict without held-out data."""
        if self.evaluator is None:
            return {}
        reach("eval")
        metrics = self.evaluator.evaluate(self.trained.chunks)
        self.sinks.log(self.step, metrics, prefix="eval/")
        return metrics

    def save(self) -> None:
        """Write a checkpoint of this step and drop the oldest ones.

        Raises :class:`~dpo_engine.errors.NumbersError` for a state that is not finite, which replaces no good one.
        """
        require_finite(
            self.engine,
            self.trained,
            NumbersError,
            f"step {self.step}: {{}} is not finite, so it was not saved; start again from the newest checkpoint with a "
            "lower optim.lr, or optim.clip_grad=1.0",
        )
        started = time.perf_counter()
        save_checkpoint(
            self.output / "checkpoints",
            self.step,
            self.trained,
            self.engine.arch,
            self.engine.groups,
            {**self.identity, "bad_steps": self.bad_steps.state()},
            keep_last=self.config.checkpoint.keep_last,
            following=self.following,
        )
        self.interruption.save_s = time.perf_counter() - started

    def write_evaluation(self) -> str:
        """Write the latest evaluation pair by pair; returns the path.

        *Collectives*: those of :func:`~dpo_engine.training.held_out.judged_pairs`, and a gather of objects.
        """
        world = self.engine.groups.world
        evaluation = judged_pairs(self.engine, self.evaluator, self.data.validation, self.step)
        path = evaluation_path(self.config, self.step)
        together(world, lambda: write_evaluation(path, evaluation) if world.rank() == 0 else None)
        return str(path)


def identity(engine: Engine, data: RunData) -> dict[str, Any]:
    """What a checkpoint must share with a run that resumes from it: the facts that fix the trajectory."""
    config = engine.config
    return {
        "model": engine.arch.digest,
        "reference": reference_identity(engine),
        "train_data": data.train.digest,
        "global_batch_size": config.train.global_batch_size,
        "order": [config.data.seed, config.data.shuffle, *(source.weight for source in config.data.train)],
        "group_by_prompt": config.data.group_by_prompt,
        "loss": {"name": config.loss.name, **config.loss.token_weighting, **engine.objective.options},
        "dtype": str(engine.platform.dtype(config.model.dtype)),
    }


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def leave_before_a_step(engine: Engine, interruption: Interruption) -> None:
    """What is done between the parts of a start.

    *Collectives*: one MAX of a number over all ranks.
    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks when a signal asked for it.
    """
    if signal := interruption.agreed(engine.groups.world, engine.platform.device):
        raise Interrupted(f"{signal}: stopped before a step was made; the same command starts again")


def train(config: Config, interruption: Interruption | None = None) -> dict[str, Any]:
    """Run ``config`` from its beginning or its newest checkpoint to its end.

    interruption   notes signals; without one, they do what they did before

    Returns  the summary: last step, its metrics, the final evaluation, paths of what was written

    Raises the engine's errors, on all ranks together.
    """
    interruption = interruption or Interruption()
    interruption.limit(config.train.save_by)
    engine = Engine.open(config)
    try:
        leave_before_a_step(engine, interruption)
        writer = engine.groups.world.rank() == 0
        output = Path(config.train.output_dir)
        notes: list[str] = []
        data = open_data(config, engine.groups, notes.append)
        notes.append(engine.settle_layout(data.train))
        leave_before_a_step(engine, interruption)
        start = resumable_step(engine, data)
        if writer:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        sinks = open_sinks(config, total_steps=data.plan.num_steps, writer=writer, start_step=start)
        try:
            for line in [*engine.describe(), *notes]:
                sinks.say(line)
            return Trainer(engine, data, sinks, interruption).fit(start)
        finally:
            sinks.close()
    finally:
        engine.close()


def resumable_step(engine: Engine, data: RunData) -> int:
    """The step of the newest checkpoint that this run continues, 0 without one; nothing has been written yet.

    *Collectives*: one gather of objects, so that all ranks go on, or leave, together.
    Raises :class:`~dpo_engine.errors.CheckpointError` when the directory's checkpoint is another run's, or may not be
    continued.
    """
    config = engine.config
    folder = Path(config.train.output_dir) / "checkpoints"
    expected = identity(engine, data)

    def look() -> int:
        newest = latest_step(folder)
        if newest is None:
            return 0
        if not config.checkpoint.resume:
            raise CheckpointError(
                f"train.output_dir={config.train.output_dir}: holds a checkpoint of step {newest} and "
                "checkpoint.resume is false; set checkpoint.resume=true, or another output_dir"
            )
        read_manifest(folder, newest, expected)
        return newest

    return together(engine.groups.world, look)


def export(config: Config, step: int | None = None, to: str | None = None) -> str:
    """Write a checkpoint of a run (the newest, or ``step``) as a Hugging Face checkpoint; returns its directory.

    Raises :class:`~dpo_engine.errors.CheckpointError` when there is none.
    """
    engine = Engine.open(config)
    try:
        output = Path(config.train.output_dir)
        folder = output / "checkpoints"
        wanted = latest_step(folder) if step is None else step
        if wanted is None:
            raise CheckpointError(f"{folder}: holds no checkpoint; train first, or give train.output_dir of the run")
        trained = engine.load_policy(total_steps=1)
        load_checkpoint(folder, wanted, trained, engine.arch, engine.groups, {"model": engine.arch.digest})
        target = Path(to) if to else output / f"hf_step_{wanted:08d}"
        engine.export(trained, target)
        return str(target)
    finally:
        engine.close()
