"""``dpo-engine export``: convert a checkpoint of a run to a Hugging Face checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch

from dpo_engine.checkpoint.best import best_saved, criterion
from dpo_engine.checkpoint.directory import HISTORY
from dpo_engine.checkpoint.load import load_checkpoint
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.cuda_graphs import without_graphs
from dpo_engine.platform.long_work import Meter, from_first
from dpo_engine.reporting.sinks import metrics_file
from dpo_engine.training.engine import Engine
from dpo_engine.training.exporting import export_policy
from dpo_engine.training.model_card import card_writer
from dpo_engine.training.start import saved
from dpo_engine.verbs import console

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    config: Config,
    step: int | None = None,
    to: str | None = None,
    *,
    best: bool = False,
    dtype: str | None = None,
    say: Callable[[str], None] = console.say,
) -> str:
    """Convert a checkpoint of a run to a Hugging Face checkpoint and return its directory.

    step   step of the checkpoint; None: the newest checkpoint
    to     directory to write; None: a directory in train.output_dir, named after the step
    best   choose the evaluated checkpoint that is best according to ``checkpoint.keep_best`` or, if that is null,
           the one with the lowest ``eval/loss``
    dtype  ``fp32``, ``bf16`` or ``fp16`` for all tensors; None: each tensor keeps the dtype that it has in model.path
    say    called with each line of the report; some lines come from every rank, others only from the first rank

    Raises :class:`~dpo_engine.errors.CheckpointError` if there is no such checkpoint;
    :class:`~dpo_engine.errors.ConfigError` for ``best`` together with ``step``.
    """
    if best and step is not None:
        raise ConfigError(f"--best: cannot be combined with --step={step}; remove one of them")
    engine = Engine.open(without_graphs(config))
    try:
        if best:
            step = from_first(
                engine.groups.world, lambda: best_saved(config, say), Meter("finding the best checkpoint")
            )
        found = saved(engine, step, say)
        trained = engine.load_policy(total_steps=1)
        load_checkpoint(found, trained, engine.arch, engine.groups)
        target = Path(to) if to else Path(config.train.output_dir) / f"hf_step_{found.step:08d}"
        identity, run = found.manifest["identity"], found.manifest["run"]
        # At its last step, a run saves first and then evaluates. The checkpoint's copy of metrics.jsonl therefore lacks
        # the last evaluation, so the run's own metrics.jsonl is preferred.
        metrics = metrics_file(config) if metrics_file(config).is_file() else found.directory / HISTORY
        chosen = str(criterion(config)) if best else None
        card = card_writer(run["config"], identity, found.manifest["layout"], found.step, metrics, dtype, chosen)
        export_policy(
            engine,
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
