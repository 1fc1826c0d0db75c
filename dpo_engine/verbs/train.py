"""``dpo-engine train``: train, evaluate, save, and export, from scratch or from the newest checkpoint."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dpo_engine.atomic_files import remove_unfinished, write_whole
from dpo_engine.checkpoint.directory import HISTORY, tidy
from dpo_engine.checkpoint.load import as_checkpoint_error
from dpo_engine.config.rules import with_loss_options
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, NumbersError
from dpo_engine.optim.host_states import update_lines
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.reporting.sinks import metrics_file, open_sinks
from dpo_engine.training.callbacks import callback_problems
from dpo_engine.training.engine import Engine
from dpo_engine.training.evaluation_files import page_lines
from dpo_engine.training.evaluation_settings import interval_problems, metric_problems
from dpo_engine.training.interruption import Interruption
from dpo_engine.training.out_of_memory import explained, planned_memory
from dpo_engine.training.output_lease import sole_writer
from dpo_engine.training.profile import require_profile
from dpo_engine.training.rank_guard import RankGuard
from dpo_engine.training.run_data import data_facts, open_data
from dpo_engine.training.start import Start, leave_before_a_step, resumption
from dpo_engine.training.trainer import Trainer
from dpo_engine.verbs import console


def train(config: Config, interruption: Interruption | None = None) -> dict[str, Any]:
    """Train a run to its end, from scratch or from its newest checkpoint.

    interruption   records signals that request a stop; None: signals keep their previous handlers

    Returns  the summary: the last step, its metrics, the final evaluation, and the paths of the written files

    Raises :class:`~dpo_engine.errors.EngineError` on all ranks if the run fails or is interrupted.
    """
    interruption = interruption or Interruption()
    interruption.limit(config.train.save_by)
    engine = Engine.open(config)
    config = engine.config
    try:
        leave_before_a_step(engine, interruption)
        notes: list[str] = []
        with sole_writer(config, engine.groups, interruption, now=console.say, note=notes.append) as confirm:
            return _train(engine, interruption, notes, confirm)
    finally:
        engine.close()


def _train(engine: Engine, interruption: Interruption, notes: list[str], confirm: Callable[[], None]) -> dict[str, Any]:
    """Train the run of ``engine``. No other run may write to the output directory. Return the summary."""
    config, world = engine.config, engine.groups.world
    writer = world.rank() == 0
    if config.optim.gradients == "bf16" and engine.dtype_name != "bfloat16":
        raise ConfigError(
            f"optim.gradients=bf16: requires model.dtype=bf16, but model.dtype is {config.model.dtype} "
            f"({engine.dtype_name} on this device); set model.dtype=bf16, or remove optim.gradients"
        )
    if problems := callback_problems(config) + metric_problems(config):
        raise ConfigError(problems)
    data = open_data(config, engine.groups, notes.append, interruption)
    notes += engine.settle_batches(data.train, data.all_pairs)
    leave_before_a_step(engine, interruption)
    guard = RankGuard(engine.rank_facts | data_facts(data), engine.arch, engine.groups, engine.platform.device)
    guard.check()
    start = resumption(engine, data, notes.append)
    data.plan = start.plan
    require_profile(config, gpu=engine.platform.gpu, num_steps=data.plan.num_steps)
    if problems := interval_problems(config, data.plan.steps_per_epoch):
        raise ConfigError(problems)
    output = Path(config.train.output_dir)
    prepare = as_checkpoint_error(lambda: prepare_output(config, start, confirm) if writer else None, output)
    without_time_limit(world, prepare, Meter(f"preparing {output}"))
    opened = partial(open_sinks, config, total_steps=data.plan.num_steps, writer=writer, start_step=start.step)
    sinks = without_time_limit(world, opened, Meter("opening the metrics sinks"))
    try:
        notes += update_lines(config.optim, gpu=engine.platform.gpu)
        for line in [*engine.describe(), *notes, f"planned memory: {planned_memory(engine)}", *page_lines(config)]:
            sinks.say(line)
        with explained(engine):
            trainer = Trainer(engine, data, start, guard, sinks, interruption, confirm=confirm)
            try:
                return trainer.fit()
            except NumbersError:
                trainer.saver.finish()  # the save that is running contains the last good state
                raise
    finally:
        sinks.close(sys.exc_info()[1])


def prepare_output(config: Config, start: Start, confirm: Callable[[], None]) -> None:
    """Prepare a run's output directory.

    Remove unfinished files, and write the configuration. If the run resumes, replace metrics.jsonl with the copy in the
    checkpoint.

    confirm  raises an error if another run has taken over the directory
    """
    confirm()
    output = Path(config.train.output_dir)
    tidy(config.checkpoint_dir)
    for directory in (output, output / "eval", output / "bad_steps"):
        remove_unfinished(directory)
    write_whole(output / "config.yaml", with_loss_options(config).to_yaml().encode())
    if start.found:
        write_whole(metrics_file(config), (start.found.directory / HISTORY).read_bytes())
