"""Try without Megatron what `train` does first: call the loss, look at the newest checkpoint, and open the trackers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dpo_engine.batching.plan import Plan, Position
from dpo_engine.checkpoint.directory import Damaged, committed, read_manifest
from dpo_engine.checkpoint.identity import identity
from dpo_engine.checkpoint.resume import COUNTING, MISSING, compare, refuse_unasked, with_all_options
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.peft import adaptation_of, adapter_digest
from dpo_engine.objective.losses import LOSSES, loss_facts
from dpo_engine.objective.options import all_options
from dpo_engine.objective.trial import trial_problems
from dpo_engine.reporting.sinks import try_open
from dpo_engine.training.evaluation_settings import interval_problems
from dpo_engine.training.run_data import open_tokenizer, with_template_date
from dpo_engine.verbs.summary import most_pairs

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
UNKNOWN = ("train_data", "reference")
"""Parts of a run's identity that are known only after tokenizing the data and loading the reference.

Only `train` compares these parts with the checkpoint's."""


def dry_run(config: Config) -> list[tuple[str, str]]:
    """Call the loss, open the trackers, and check the intervals and the newest checkpoint of a run.

    Call this for a run in which `check` has found no problems.

    Returns  the lines to print, each with its subject

    Raises `ConfigError` with all problems of the loss, the intervals and the trackers. Without such problems, raises
    `CheckpointError` as :func:`try_resume` does.
    """
    options = all_options(config.loss.name, config.loss.options)
    problems = trial_problems(config.loss.name, options)
    tracked, found = try_trackers(config)
    if most := most_pairs(config):
        found = interval_problems(config, -(-most // config.train.global_batch_size)) + found
    if problems + found:
        raise ConfigError(problems + found)
    coupled = loss_facts(LOSSES[config.loss.name], options).couples_pairs
    alone = "couples the pairs of a step" if coupled else "does not couple pairs"
    lines = [("loss", f"on two example pairs, it is finite, has gradients, and {alone}")]
    lines += [("resume", line) for line in try_resume(config)]
    return lines + [("tracker", line) for line in tracked]


def try_resume(config: Config) -> list[str]:
    """Compare the run with its newest checkpoint. This neither tokenizes data nor loads weights.

    Returns  a line for each damaged checkpoint that is newer than all readable ones; then, if there is a readable
             checkpoint, a line about the step after which the run would resume

    Raises `CheckpointError` if `train` would refuse to resume, or if the run has a checkpoint but
    ``checkpoint.resume`` is false.
    """
    refuse_unasked(config)
    lines = []
    for directory in reversed(committed(config.checkpoint_dir)):
        try:
            manifest = read_manifest(directory)
        except (OSError, Damaged) as error:
            lines.append(f"{directory.name} cannot be read and would be skipped: {error}")
            continue
        saved = with_all_options(manifest["identity"])
        current = _identity(config, saved, Position(**manifest["run"]["position"]))
        changes = compare(saved, current, config.checkpoint.accept_changes, where=directory)
        accepted = f", with accepted changes of {', '.join(change.key for change in changes)}" if changes else ""
        weights = ", the base weights" if config.adapter else ""
        rest = (
            f"`train` also compares the training data{weights} and the reference with those of the checkpoint, and "
            "checks the hashes of the checkpoint's files"
        )
        return [*lines, f"would resume after step {manifest['step']}{accepted}; {rest}"]
    return lines


def _identity(config: Config, saved: dict[str, Any], position: Position) -> dict[str, Any]:
    """Return the known part of the run's identity.

    The number of training pairs and, with adapters, the base weights are assumed to be those of the checkpoint.
    """
    pairs, arch, adapter = saved["train_data"]["pairs"], read_architecture(config.model.path), None
    if config.adapter:
        start = adapter_digest(config.adapter.path) if config.adapter.path else None
        base = (saved.get("adapter") or {}).get("base")
        adapter = {**adaptation_of(config.adapter, arch).facts, "base": base, "start": start}
    found = identity(
        config,
        arch,
        dtype=DTYPES.get(config.model.dtype, "unknown"),
        loss_options=all_options(config.loss.name, config.loss.options),
        reference=None,
        train_data={},
        tokenizer=open_tokenizer(with_template_date(config)).content,
        total_steps=Plan(
            _Sized(np.zeros(pairs, dtype=np.int64)),
            weights=[1.0],
            global_batch_size=config.train.global_batch_size,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps,
            start=position,
        ).num_steps,
        adapter=adapter,
    )
    unknown = {*UNKNOWN, *(("dtype",) if found["dtype"] == "unknown" else ())}
    if any(saved.get(key, MISSING) != found[key] for key in COUNTING if key not in unknown):
        unknown.add("total_steps")  # the difference found here can also change the number of steps
    return {key: value for key, value in found.items() if key not in unknown}


class _Sized:
    """A data set of which only the size is known."""

    def __init__(self, source_ids: np.ndarray):
        self.source_ids = self.prompt_keys = source_ids

    def __len__(self) -> int:
        return len(self.source_ids)


def try_trackers(config: Config) -> tuple[list[str], list[str]]:
    """Open the run's trackers offline, in a temporary directory, and close them.

    Registered sinks (`logging.sinks`) are not opened, because the engine cannot keep them from creating a run on a
    server. Their names and options are checked with the rest of the configuration.

    Returns  lines that say what was tried, and a line for each problem
    """
    logging = config.logging
    unopened = f"{', '.join(logging.sinks)}: not opened, because a registered sink could create a run on a server"
    left = [unopened] if logging.sinks else []
    if not (logging.tensorboard or logging.wandb or logging.mlflow):
        return left, []
    with tempfile.TemporaryDirectory(prefix="dpo-engine-check-") as folder, _quiet():
        local: dict[str, Any] = {"sinks": {}}
        if logging.wandb:
            local["wandb"] = logging.wandb.model_copy(update={"mode": "offline"})
        if logging.mlflow:
            local["mlflow"] = logging.mlflow.model_copy(update={"tracking_uri": (Path(folder) / "tracking").as_uri()})
        tried = config.model_copy(update={"logging": logging.model_copy(update=local)})
        problems = try_open(tried, Path(folder))
    names = [name for name in ("tensorboard", "wandb", "mlflow") if getattr(logging, name)]
    opened = f"{', '.join(names)}: opened in a temporary directory, without a connection to a server"
    return ([] if problems else [opened]) + left, problems


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, keep W&B from printing, and let MLflow store its data in a folder."""
    wanted = {"WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
