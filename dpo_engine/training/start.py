"""Decide where a run starts: at step 0, or from its newest intact checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_engine.batching.plan import Plan, Position
from dpo_engine.checkpoint.identity import code_version, frozen, identity, model_identity, record
from dpo_engine.checkpoint.load import Checkpoint, find_checkpoint
from dpo_engine.checkpoint.resume import (
    accepted_lines,
    compare,
    entries,
    keeps_following,
    keeps_random,
    next_position,
    refuse_unasked,
    with_all_options,
)
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError, Interrupted
from dpo_engine.objective.options import all_options
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.training.engine import Engine
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.references import reference_identity
from dpo_engine.training.run_data import RunData, make_plan
from dpo_engine.wording import show


@dataclass(frozen=True)
class Start:
    """The starting point of a run, and what its checkpoints record about the run.

    found            the checkpoint to resume from; None to start at step 0
    plan             the run's steps from this starting point on
    identity         settings and data that determine the run's results; see :mod:`~dpo_engine.checkpoint.identity`
    code             versions of the engine, the plugins, and the libraries
    history          changes accepted since the run began
    lines            lines to log about the resumption
    keeps_following  whether a periodically updated reference restores its weights from the checkpoint
    keeps_random     whether to restore the states of the random number generators from the checkpoint
    """

    found: Checkpoint | None
    plan: Plan
    identity: dict[str, Any]
    code: dict[str, str]
    history: tuple[dict[str, Any], ...] = ()
    lines: tuple[str, ...] = ()
    keeps_following: bool = True
    keeps_random: bool = True

    @property
    def step(self) -> int:
        """Number of steps already done."""
        return self.found.step if self.found else 0

    def record(self, config: Config, step: int) -> dict[str, Any]:
        """Return what the checkpoint for ``step`` records about the run in addition to its identity."""
        position, plan = self.plan.position(step), self.plan.digest
        return record(config, plan=plan, position=position, code=self.code, history=self.history)


def saved(
    engine: Engine, step: int | None, say: Callable[[str], None], *, way_out: str = "set another train.output_dir"
) -> Checkpoint:
    """Find the checkpoint for ``step`` (None: the newest intact checkpoint), and check that it fits the model.

    The optimizer and the frozen weights must also match. All other settings may differ from the checkpoint's settings.

    say      called on every rank with a line for each skipped checkpoint, and with a line about files that lie
             in the returned checkpoint's directory but are not part of this checkpoint
    way_out  advice in the error message if there is no checkpoint

    *Collectives*: those of :func:`~dpo_engine.checkpoint.load.find_checkpoint` and of ``Engine.adapter_identity``.
    Raises :class:`~dpo_engine.errors.CheckpointError` if there is no such checkpoint, or if its model,
    optimizer or frozen weights differ from this run's.
    """
    folder = engine.config.checkpoint_dir
    found = find_checkpoint(folder, engine.groups.world, step=step, say=say)
    if found is None:
        raise CheckpointError(f"{folder}: contains no checkpoint; train first, or {way_out}")
    optim = engine.config.optim
    mine = {"optim.optimizer": optim.optimizer, "optim.freeze": frozen(engine.config)}  # saved state depends on them
    mine |= model_identity(engine.arch, engine.adapter_identity)
    compare(found.manifest["identity"], mine, where=found.directory)
    return found


def resumption(engine: Engine, data: RunData, say: Callable[[str], None]) -> Start:
    """Decide where the run starts. Write no files.

    say   called on every rank with a line for each skipped checkpoint, and with a line about files that lie in
          the directory of the checkpoint to resume from but are not part of this checkpoint

    *Collectives*: those of :func:`~dpo_engine.training.references.reference_identity`, of ``Engine.adapter_identity``
    and of :func:`~dpo_engine.checkpoint.load.find_checkpoint`, and all-gathers of objects, so that either all ranks
    continue, or all ranks raise the same error. Reading files has no time limit.
    Raises :class:`~dpo_engine.errors.CheckpointError` if the directory contains a checkpoint from which this run must
    not resume.
    """
    config, world = engine.config, engine.groups.world
    folder = config.checkpoint_dir
    reference, adapter = reference_identity(engine), engine.adapter_identity
    code = without_time_limit(world, lambda: code_version(config.plugins), Meter("reading the code of the engine"))

    def identity_with(plan: Plan) -> dict[str, Any]:
        return identity(
            config,
            engine.arch,
            dtype=engine.dtype_name,
            loss_options=all_options(config.loss.name, config.loss.options),
            reference=reference,
            train_data={"pairs": len(data.train), "digest": data.train.digest},
            tokenizer=data.tokenizer,
            total_steps=plan.num_steps,
            adapter=adapter,
        )

    def start_from(found: Checkpoint | None) -> Start:
        if found is None:
            return Start(None, data.plan, identity_with(data.plan), code)
        step, accepted = found.step, config.checkpoint.accept_changes
        saved, run = with_all_options(found.manifest["identity"]), found.manifest["run"]
        position = next_position(saved, identity_with(data.plan), Position(**run["position"]))
        plan = make_plan(config, data.train, position)
        current = identity_with(plan)
        changes = compare(saved, current, accepted, where=found.directory)
        lines = [f"resumed after step {step}", *accepted_lines(changes, accepted, step)]
        lines += [
            f"{name} was {run['code'].get(name, 'not used')} when the checkpoint was saved and is now {version}: "
            "results may differ by rounding"
            for name, version in code.items()
            if run["code"].get(name) != version
        ]
        lines += _changed_batches(run["config"].get("batch", {}), config)
        history = (*run["history"], *entries(changes, step))
        kept = {"keeps_following": keeps_following(saved, current), "keeps_random": keeps_random(saved, current)}
        return Start(found, plan, current, code, history, tuple(lines), **kept)

    def start_or_say_why() -> Start:
        try:
            return start_from(found)
        except CheckpointError as error:  # also report the skipped checkpoints: the caller has not logged them yet
            raise CheckpointError([*passed_over, *error.problems]) from error

    without_time_limit(world, lambda: refuse_unasked(config), Meter(f"reading {config.train.output_dir}"))
    passed_over: list[str] = []
    found = find_checkpoint(folder, world, say=passed_over.append)
    for line in passed_over:
        say(line)
    return without_time_limit(world, start_or_say_why, Meter("reading the manifest of the checkpoint"))


def _changed_batches(before: Mapping[str, Any], config: Config) -> list[str]:
    """Return a line for each setting of micro-batches that differs from the checkpoint's setting.

    The values can differ even if the setting is still ``auto``, because the value that replaces ``auto`` depends on
    the devices. Checkpoints of earlier versions do not record the values. For such a checkpoint, there is no line.
    """
    now = config.batch.model_dump(include={"layout", "tokens_per_micro_batch"})
    return [
        f"batch.{name} was {show(before.get(name))} when the checkpoint was saved and is now {show(value)}: "
        "results may differ by rounding"
        for name, value in now.items()
        if before.get(name) not in (None, "auto", value) and value != "auto"
    ]


def pairs_seen(manifest: Mapping[str, Any]) -> int:
    """Return the number of pairs in all steps up to a checkpoint.

    Older checkpoints do not record this number. For these checkpoints, the number is computed from the position in the
    data. The result can be wrong if the training data or the order changed during the run.
    """
    run = manifest["run"]
    if "pairs_seen" in run:
        return run["pairs_seen"]
    return run["position"]["epoch"] * manifest["identity"]["train_data"]["pairs"] + run["position"]["pair"]


def leave_before_a_step(engine: Engine, interruption: Interruption) -> None:
    """Stop before the first training step if a signal was received. Call this between the stages of the startup.

    *Collectives*: one MAX of a number over all ranks.
    Raises :class:`~dpo_engine.errors.Interrupted` on all ranks if any of them received a signal.
    """
    if signal := interruption.agreed(engine.groups.world, engine.platform.device):
        raise stopped_before_a_step(signal)


def stopped_before_a_step(signal: str) -> Interrupted:
    """Return the error of a run that a signal stopped before its first training step."""
    return Interrupted(f"{signal}: stopped before training a step; run the same command to start again")
