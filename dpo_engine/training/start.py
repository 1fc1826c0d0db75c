"""Where a run starts: at its beginning, or after the newest checkpoint that it may continue."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_engine.batching.plan import Plan, Position
from dpo_engine.checkpoint.directory import steps
from dpo_engine.checkpoint.identity import code_version, identity, model_identity, record
from dpo_engine.checkpoint.load import Checkpoint, find_checkpoint
from dpo_engine.checkpoint.resume import accepted_lines, compare, entries, keeps_following, keeps_random, next_position
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError
from dpo_engine.platform.parallel import together
from dpo_engine.training.engine import Engine
from dpo_engine.training.references import reference_identity
from dpo_engine.training.run_data import RunData, make_plan


@dataclass(frozen=True)
class Start:
    """Where a run starts and what it is.

    found            the checkpoint, None for the beginning
    plan             its steps from there on
    identity         what its checkpoints say that it is
    code             versions of what computes it
    history          accepted changes since the run began
    lines            what the log says
    keeps_following  a reference that follows the policy has its weights from the checkpoint
    keeps_random     random generators have their states from it
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
        """Steps that are done."""
        return self.found.step if self.found else 0

    def record(self, config: Config, step: int) -> dict[str, Any]:
        """What the checkpoint of ``step`` says about the run beside its identity."""
        position, plan = self.plan.position(step), self.plan.digest
        return record(config, plan=plan, position=position, code=self.code, history=self.history)


def saved(
    engine: Engine, step: int | None, say: Callable[[str], None], *, way_out: str = "give train.output_dir of the run"
) -> Checkpoint:
    """The checkpoint of ``step``, or the newest one, of a run whose model this is; the rest of the run may be another.

    say      called on every rank with a line for each checkpoint that is passed over
    way_out  what to do where there is none

    *Collectives*: those of :func:`~dpo_engine.checkpoint.load.find_checkpoint`.
    Raises :class:`~dpo_engine.errors.CheckpointError` when there is none, or it is another model's.
    """
    folder = engine.config.checkpoint_dir
    found = find_checkpoint(folder, engine.groups.world, step=step, say=say)
    if found is None:
        raise CheckpointError(f"{folder}: holds no checkpoint; train first, or {way_out}")
    compare(found.manifest["identity"], model_identity(engine.arch), where=found.directory)
    return found


def resumption(engine: Engine, data: RunData, say: Callable[[str], None]) -> Start:
    """Where the run starts; nothing has been written yet.

    say   called on every rank with a line for each checkpoint that is passed over

    *Collectives*: those of :func:`~dpo_engine.checkpoint.load.find_checkpoint`, and gathers of objects, so that all
    ranks go on, or leave, together.
    Raises :class:`~dpo_engine.errors.CheckpointError` when the directory's checkpoint is another run's, or may not be
    continued.
    """
    config, world = engine.config, engine.groups.world
    folder = config.checkpoint_dir
    reference = reference_identity(engine)
    code = code_version(config.plugins)

    def identity_with(plan: Plan) -> dict[str, Any]:
        return identity(
            config,
            engine.arch,
            dtype=engine.dtype_name,
            loss_options=engine.objective.options,
            reference=reference,
            train_data={"pairs": len(data.train), "digest": data.train.digest},
            tokenizer=data.tokenizer,
            total_steps=plan.num_steps,
        )

    def allowed() -> None:
        if not config.checkpoint.resume and (there := steps(folder)):
            raise CheckpointError(
                f"train.output_dir={config.train.output_dir}: holds a checkpoint of step {there[-1]} and "
                "checkpoint.resume is false; set checkpoint.resume=true, or another output_dir"
            )

    def start_from(found: Checkpoint | None) -> Start:
        if found is None:
            return Start(None, data.plan, identity_with(data.plan), code)
        step, accepted = found.step, config.checkpoint.accept_changes
        saved, run = found.manifest["identity"], found.manifest["run"]
        position = next_position(saved, identity_with(data.plan), Position(**run["position"]))
        plan = make_plan(config, data.train, position)
        current = identity_with(plan)
        changes = compare(saved, current, accepted, where=found.directory)
        lines = [f"resumed after step {step}", *accepted_lines(changes, accepted, step)]
        lines += [
            f"{name} was {run['code'].get(name)} when the checkpoint was written, and is {version}: numbers may round "
            "differently"
            for name, version in code.items()
            if run["code"].get(name) != version
        ]
        history = (*run["history"], *entries(changes, step))
        kept = {"keeps_following": keeps_following(saved, current), "keeps_random": keeps_random(saved, current)}
        return Start(found, plan, current, code, history, tuple(lines), **kept)

    def start_or_say_why() -> Start:
        try:
            return start_from(found)
        except CheckpointError as error:  # before anything was logged
            raise CheckpointError([*passed_over, *error.problems]) from error

    together(world, allowed)
    passed_over: list[str] = []
    found = find_checkpoint(folder, world, say=passed_over.append)
    for line in passed_over:
        say(line)
    return together(world, start_or_say_why)
