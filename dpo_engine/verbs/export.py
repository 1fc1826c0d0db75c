"""``dpo-engine export``: convert a checkpoint of a run to a Hugging Face checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch

from dpo_engine.checkpoint.best import best_step
from dpo_engine.checkpoint.directory import HISTORY, steps
from dpo_engine.checkpoint.load import load_checkpoint
from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.platform.long_work import from_first
from dpo_engine.reporting.sinks import metrics_file, read_metrics
from dpo_engine.training.engine import Engine
from dpo_engine.training.model_card import card_writer
from dpo_engine.training.start import saved
from dpo_engine.verbs import console

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    config: Config,
    step: int | None = None,
    to: str | None = None,
    *,
    best: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = console.say,
) -> str:
    """Convert a checkpoint of a run to a Hugging Face checkpoint and return its directory.

    step   step of the checkpoint; None: the newest checkpoint
    to     directory to write; None: a directory in train.output_dir, named after the step
    best   choose the checkpoint by a held-out metric: the lowest ``loss``, or the highest ``accuracy`` or ``margin``
    dtype  ``fp32``, ``bf16`` or ``fp16`` for all tensors; None: each tensor has its dtype in model.path
    say    called with each line of the report; some lines come from every rank, others only from the first rank

    Raises :class:`~dpo_engine.errors.CheckpointError` if there is no such checkpoint;
    :class:`~dpo_engine.errors.ConfigError` for ``best`` together with ``step``.
    """
    if best is not None and step is not None:
        raise ConfigError(f"--best={best}: cannot be combined with --step={step}; remove one of them")
    engine = Engine.open(config)
    try:
        if best is not None:
            step = from_first(engine.groups.world, lambda: choose(config, best, say))
        found = saved(engine, step, say)
        trained = engine.load_policy(total_steps=1)
        load_checkpoint(found, trained, engine.arch, engine.groups)
        target = Path(to) if to else Path(config.train.output_dir) / f"hf_step_{found.step:08d}"
        identity, run = found.manifest["identity"], found.manifest["run"]
        # The run evaluates its last step after saving it, so the checkpoint's own copy lacks that evaluation.
        metrics = metrics_file(config) if metrics_file(config).is_file() else found.directory / HISTORY
        card = card_writer(run["config"], identity, found.manifest["layout"], found.step, metrics, dtype)
        engine.export(
            trained,
            target,
            dtype=None if dtype is None else DTYPES[dtype],
            card=card,
            tokenizer=identity["tokenizer"],
            say=say,
        )
        return str(target)
    finally:
        engine.close()


def choose(config: Config, by: str, say: Callable[[str], None] = lambda line: None) -> int:
    """Return the step of the run's checkpoint with the best held-out value of the metric ``by``.

    say  called with a line about the choice, and with a line if a better step has no checkpoint

    Raises :class:`~dpo_engine.errors.CheckpointError` if no checkpoint has been evaluated.
    """
    folder = config.checkpoint_dir
    lines, kept = read_metrics(metrics_file(config)), steps(folder)
    best, overall = best_step(lines, by, kept), best_step(lines, by)
    if best is None:
        raise CheckpointError(
            f"--best={by}: no checkpoint in {folder} has a held-out {by} in {metrics_file(config)}; evaluate at the "
            "steps that are saved (train.eval_interval), or choose a step with --step"
        )
    say(f"best checkpoint by held-out {by}: step {best.step} ({by} {best.value:.6g})")
    if overall.step != best.step:
        say(
            f"step {overall.step} had a better held-out {by} ({overall.value:.6g}) but has no checkpoint; set "
            "checkpoint.keep_best to keep it in the next run"
        )
    return best.step
