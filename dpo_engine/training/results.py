"""Write the results of a finished run: its last evaluation, its Hugging Face checkpoint, and its page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_engine.checkpoint.best import best_saved, criterion
from dpo_engine.checkpoint.load import find_checkpoint, load_checkpoint
from dpo_engine.errors import CheckpointError, ConfigError, EngineError, NumbersError, PeerError
from dpo_engine.platform.long_work import Meter, from_first, without_time_limit
from dpo_engine.reporting.pair_file import write_evaluation
from dpo_engine.reporting.sinks import metrics_file
from dpo_engine.training.callbacks import Run
from dpo_engine.training.evaluate import Evaluator, evaluation_path, judged_pairs
from dpo_engine.training.evaluation_files import write_run_page
from dpo_engine.training.exporting import export_policy
from dpo_engine.training.model_card import card_writer


def write_results(run: Run, evaluator: Evaluator | None, identity: dict[str, Any]) -> dict[str, str]:
    """Write the files that a finished run leaves in addition to its checkpoints.

    evaluator  evaluator of the held-out pairs; its latest evaluation is written. None: there are no held-out pairs
    identity   the run's identity; see :mod:`~dpo_engine.checkpoint.identity`

    Returns  the paths of the evaluation (``eval_pairs``) and of the export (``hf``), if they were written

    *Collectives*: those of :func:`~dpo_engine.training.evaluate.judged_pairs`, of exporting, and of
    :func:`~dpo_engine.training.evaluation_files.write_run_page`; over world, two all-gathers of objects; with
    ``checkpoint.export: best``, also those of choosing and loading a checkpoint. Writing has no time limit.
    Raises :class:`~dpo_engine.errors.EngineError` on all ranks if the evaluation or the export cannot be written. The
    message says how to write the result later, except if a rank was lost or if numbers are not finite.
    """
    written = {}
    if evaluator:
        written["eval_pairs"] = str(_write_pairs(run, evaluator))
    if run.config.checkpoint.export:
        written["hf"] = str(_export(run, identity))
    write_run_page(run)
    return written


def _write_pairs(run: Run, evaluator: Evaluator) -> Path:
    """Write the latest evaluation to a Parquet file with one row per pair, and return its path."""
    engine, step = run.engine, run.step
    world = engine.groups.world
    evaluation = judged_pairs(engine, evaluator, run.data.validation, step)
    path = evaluation_path(run.config, step)

    def write() -> None:
        try:
            write_evaluation(path, evaluation)
        except ConfigError as error:  # the engine chose the path, so the cause is the storage
            raise CheckpointError(error.problems) from error

    with _saved_already("eval", step):
        without_time_limit(world, write if world.rank() == 0 else lambda: None, Meter(f"writing {path}"))
    return path


def _export(run: Run, identity: dict[str, Any]) -> Path:
    """Write the policy as a Hugging Face checkpoint to ``<train.output_dir>/hf``, and return this path.

    With ``checkpoint.export: best``, first load the best checkpoint, unless the last step is the best step.
    """
    engine, step, best = run.engine, run.step, run.config.checkpoint.export == "best"
    config, layout = run.config.model_dump(mode="json"), asdict(engine.groups.dims)
    target = run.output / "hf"
    with _saved_already("export --best" if best else "export", run.step):
        if best:
            step = from_first(
                engine.groups.world, lambda: best_saved(run.config, run.sinks.say), Meter("finding the best checkpoint")
            )
        if step != run.step:
            found = find_checkpoint(run.config.checkpoint_dir, engine.groups.world, step=step, say=run.sinks.say)
            load_checkpoint(found, run.trained, engine.arch, engine.groups, random=False)
            config, identity, layout = (
                found.manifest["run"]["config"],
                found.manifest["identity"],
                found.manifest["layout"],
            )
        chosen = str(criterion(run.config)) if best else None
        card = card_writer(config, identity, layout, step, metrics_file(run.config), chosen=chosen)
        export_policy(engine, run.trained, target, card=card, tokenizer=identity["tokenizer"], say=run.sinks.say)
    return target


@contextmanager
def _saved_already(verb: str, step: int) -> Iterator[None]:
    """Append a way out to errors in this block: the run is saved, and ``dpo-engine <verb>`` can do the work later."""
    try:
        yield
    except (PeerError, NumbersError):
        # Writing later does not help: rerun the command after a PeerError, use an earlier step after a NumbersError.
        raise
    except EngineError as error:
        *others, last = error.problems
        later = f"the checkpoint for step {step} is saved; write the result later with `dpo-engine {verb} RUN.yaml`"
        raise type(error)([*others, f"{last}; {later}"]) from error
