"""``dpo-engine export``: convert a checkpoint of a run to a Hugging Face checkpoint."""

from collections.abc import Callable
from pathlib import Path

from dpo_engine.checkpoint.load import load_checkpoint
from dpo_engine.config.run import Config
from dpo_engine.training.engine import Engine
from dpo_engine.training.start import saved
from dpo_engine.verbs import console


def export(
    config: Config, step: int | None = None, to: str | None = None, say: Callable[[str], None] = console.say
) -> str:
    """Convert a checkpoint of a run to a Hugging Face checkpoint and return its directory.

    step  step of the checkpoint; None: the newest checkpoint
    to    directory to write; None: a directory in train.output_dir, named after the step
    say   called on every rank with a line for each skipped checkpoint

    Raises :class:`~dpo_engine.errors.CheckpointError` if there is no such checkpoint.
    """
    engine = Engine.open(config)
    try:
        found = saved(engine, step, say)
        trained = engine.load_policy(total_steps=1)
        load_checkpoint(found, trained, engine.arch, engine.groups)
        target = Path(to) if to else Path(config.train.output_dir) / f"hf_step_{found.step:08d}"
        engine.export(trained, target)
        return str(target)
    finally:
        engine.close()
