"""The loop: batches, step, metrics, checkpoint. Owns time, and the files of a run."""

import math
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
from dpo_engine.platform.parallel import together
from dpo_engine.scoring.reference import ResidentReference
from dpo_engine.training.checkpoint import latest_step, load_checkpoint, save_checkpoint
from dpo_engine.training.engine import Engine, batch_facts, pair_flops, token_count
from dpo_engine.training.first_step import dead_stages, first_step_problems
from dpo_engine.training.held_out import evaluation_path, held_out_evaluator, judged_pairs
from dpo_engine.training.identity import model_identity
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.rank_guard import RankGuard
from dpo_engine.training.reference_modes import following, open_reference
from dpo_engine.training.resumption import Start, resumption
from dpo_engine.training.run_data import RunData, data_facts, open_data
from dpo_engine.training.sinks import Sinks, open_sinks
from dpo_engine.training.step import train_step
from dpo_engine.training.store_filling import leave_if_asked


class Trainer:
    """One run on one rank, from its first step to its last."""

    def __init__(
        self, engine: Engine, data: RunData, start: Start, guard: RankGuard, sinks: Sinks, interruption: Interruption
    ):
        self.engine = engine
        self.config = engine.config
        self.data = data
        self.start = start
        self.guard = guard
        self.sinks = sinks
        self.interruption = interruption
        self.output = Path(engine.config.train.output_dir)
        self.step = 0
        self.trained = engine.load_policy(total_steps=data.plan.num_steps)
        self.reference = open_reference(
            engine,
            self.trained.chunks,
            pairs=data.all_pairs,
            upcoming=self.upcoming,
            say=sinks.say,
            between=partial(leave_if_asked, interruption),
        )
        self.following = following(self.reference, engine.config.reference)
        held_out = data.validation is not None and len(data.validation)
        self.evaluator = held_out_evaluator(engine, data.validation, self.reference) if held_out else None

    def upcoming(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the coming steps, as far ahead as ``reference.ahead`` says."""
        plan = self.data.plan
        for step in range(self.step, min(self.step + self.config.reference.ahead, plan.num_steps)):
            yield self.engine.batches(self.data.train, plan.pairs(step))

    def resume(self) -> None:
        """Continue from the checkpoint that the run starts with, if there is one."""
        start = self.start
        if start.step == 0:
            return
        self.step = load_checkpoint(
            self.output / "checkpoints",
            start.step,
            self.trained,
            self.engine.arch,
            self.engine.groups,
            start.identity,
            accepted=self.config.checkpoint.accept_changes,
            following=self.following if start.keeps_following else (),
        )
        for line in start.lines:
            self.sinks.say(line)

    def fit(self) -> dict[str, Any]:
        """Run every step that is left, evaluate and save when due, export at the end. Returns the run's summary.

        Raises :class:`~dpo_engine.errors.Interrupted`, on all ranks after the same step, when a signal asked for it.
        """
        config, plan = self.config, self.data.plan
        self.resume()
        self.check_ranks()
        if self.step >= plan.num_steps:
            self.sinks.say(f"nothing left to train: step {self.step} of {plan.num_steps} is done")
        evaluations: dict[str, float] = {}
        metrics: dict[str, float] = {}
        if config.train.eval_at_start and self.step == 0:
            self.evaluate()
        while self.step < plan.num_steps:
            metrics = self.train_one(plan.pairs(self.step))
            reach("step")
            self.check_numbers(metrics)
            if self.step == 1:
                self.check_first_step(metrics)
            if _due(self.step, config.train.guard_interval):
                self.check_ranks()
            if self.following and self.step % config.reference.sync_every == 0:
                self.reference.follow(self.trained.chunks, config.reference.sync_alpha)
            if self.step % config.logging.log_interval == 0 or self.step == plan.num_steps:
                self.sinks.log(self.step, metrics)
            last = self.step == plan.num_steps
            if last or _due(self.step, config.train.eval_interval):
                evaluations = self.evaluate()
            stop = None if last else self.interruption.agreed()
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
        )
        engine.platform.synchronize()
        self.step += 1
        elapsed = time.perf_counter() - started
        metrics |= {
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

    def check_numbers(self, metrics: dict[str, float]) -> None:
        """Stop before a diverged policy replaces a good checkpoint.

        Raises :class:`~dpo_engine.errors.NumbersError` when the loss or the gradient norm of the step is not finite.
        """
        wrong = [f"{name}={metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if wrong:
            raise NumbersError(
                f"step {self.step}: {' and '.join(wrong)}; nothing of this step was saved. A lower optim.lr, "
                "optim.clip_grad=1.0 or a look at the batch's pairs is the way out"
            )

    def check_first_step(self, metrics: dict[str, float]) -> None:
        """What must hold of any first step: see :mod:`~dpo_engine.training.first_step`.

        *Collectives*: one gather of objects over all ranks.
        Raises :class:`~dpo_engine.errors.NumbersError` naming the likely causes.
        """
        problems = first_step_problems(self.engine, metrics) + dead_stages(self.engine, self.trained)
        if problems:
            raise NumbersError(problems)

    def check_ranks(self) -> None:
        """Compare all ranks: see :meth:`~dpo_engine.training.rank_guard.RankGuard.check`.

        *Collectives*, Raises  as there
        """
        models = {"policy": [chunk.module for chunk in self.trained.chunks]}
        if isinstance(self.reference, ResidentReference):
            models["reference"] = self.reference.chunks
        self.guard.check(models, step=self.step)

    def evaluate(self) -> dict[str, float]:
        """Metrics over every held-out pair; an empty dict without held-out data."""
        if self.evaluator is None:
            return {}
        reach("eval")
        metrics = self.evaluator.evaluate(self.trained.chunks)
        self.sinks.log(self.step, metrics, prefix="eval/")
        return metrics

    def save(self) -> None:
        """Write a checkpoint of this step and drop the oldest ones."""
        save_checkpoint(
            self.output / "checkpoints",
            self.step,
            self.trained,
            self.engine.arch,
            self.engine.groups,
            self.start.identity,
            keep_last=self.config.checkpoint.keep_last,
            following=self.following,
            run=self.start.record(self.config, self.step),
        )

    def write_evaluation(self) -> str:
        """Write the latest evaluation pair by pair; returns the path.

        *Collectives*: those of :func:`~dpo_engine.training.held_out.judged_pairs`, and a gather of objects.
        """
        world = self.engine.groups.world
        evaluation = judged_pairs(self.engine, self.evaluator, self.data.validation, self.step)
        path = evaluation_path(self.config, self.step)
        together(world, lambda: write_evaluation(path, evaluation) if world.rank() == 0 else None)
        return str(path)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def train(config: Config) -> dict[str, Any]:
    """Run ``config`` from its beginning or its newest checkpoint to its end.

    Returns  the summary: last step, its metrics, the final evaluation, paths of what was written

    Raises the engine's errors, on all ranks together.
    """
    engine = Engine.open(config)
    try:
        writer = engine.groups.world.rank() == 0
        output = Path(config.train.output_dir)
        notes: list[str] = []
        data = open_data(config, engine.groups, notes.append)
        notes.append(engine.settle_layout(data.train))
        guard = RankGuard(engine.rank_facts | data_facts(data), engine.arch, engine.groups, engine.platform.device)
        guard.check()
        start = resumption(engine, data)
        data.plan = start.plan
        guard.facts["checkpoint"] = {"newest step": str(start.step)}
        guard.check()
        if writer:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        sinks = open_sinks(config, total_steps=data.plan.num_steps, writer=writer, start_step=start.step)
        try:
            for line in [*engine.describe(), *notes]:
                sinks.say(line)
            with Interruption(engine.groups.world, engine.platform.device) as interruption:
                return Trainer(engine, data, start, guard, sinks, interruption).fit()
        finally:
            sinks.close()
    finally:
        engine.close()


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
        load_checkpoint(folder, wanted, trained, engine.arch, engine.groups, model_identity(engine.arch))
        target = Path(to) if to else output / f"hf_step_{wanted:08d}"
        engine.export(trained, target)
        return str(target)
    finally:
        engine.close()
