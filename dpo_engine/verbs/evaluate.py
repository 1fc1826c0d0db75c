"""``dpo-engine eval``: evaluate a checkpoint of a run, or its initial weights, on all held-out pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_engine.checkpoint.load import Checkpoint, load_checkpoint
from dpo_engine.checkpoint.resume import keeps_following
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.errors import ConfigError, NumbersError
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.reporting.comparison import compare, report
from dpo_engine.reporting.pair_file import read_evaluation, write_evaluation, write_json
from dpo_engine.scoring.reference import Reference
from dpo_engine.training.engine import Engine
from dpo_engine.training.evaluate import evaluation_path, held_out_evaluator, judged_pairs
from dpo_engine.training.references import following, open_reference, reference_identity
from dpo_engine.training.run_data import open_held_out
from dpo_engine.training.start import saved
from dpo_engine.verbs import console


def evaluate(
    config: Config,
    *,
    step: int | None = None,
    to: str | None = None,
    against: str | None = None,
    say: Callable[[str], None] = console.say,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run on its held-out pairs, in this run's layout, and write the results.

    step     step of the checkpoint; None: the newest checkpoint; 0: the weights at model.path
    to       Parquet file to write; None: a file in train.output_dir, named after the step
    against  Parquet file of another evaluation to compare with
    say      called with each line for the log

    Returns  on rank 0, the report, with the key ``against`` if a comparison was requested, and the key ``files`` with
             the paths of the Parquet and JSON files; on the other ranks, an empty dictionary

    Raises :class:`~dpo_engine.errors.EngineError` on all ranks if the evaluation fails. If values of a pair are not
    finite, this is a :class:`~dpo_engine.errors.NumbersError`, and the Parquet file is written first.
    """
    if config.data.validation is None and not config.data.validation_fraction:
        raise ConfigError(
            "data.validation=null: evaluation needs validation data; set data.validation or data.validation_fraction"
        )
    if to is not None and not to.endswith(".parquet"):
        raise ConfigError(f"--to={to}: must end with .parquet; pass --to FILE.parquet (the summary goes to FILE.json)")
    engine = Engine.open(config)
    config = engine.config
    try:
        world = engine.groups.world
        writer = world.rank() == 0
        other = without_time_limit(world, lambda: read_evaluation(against) if against and writer else None)
        pairs = open_held_out(config, engine.groups, say)
        engine.settle_layout(pairs)
        way_out = "evaluate model.path with --step 0"
        found = None if step == 0 else saved(engine, step, say, way_out=way_out)
        step = found.step if found else 0
        chunks, reference = load_step(engine, found, pairs, say)
        evaluator = held_out_evaluator(engine, pairs, reference)
        evaluator.evaluate(chunks)
        evaluation = judged_pairs(engine, evaluator, pairs, step)
        path = Path(to) if to else evaluation_path(config, step)
        meter = Meter(f"writing {path}")
        without_time_limit(world, lambda: write_evaluation(path, evaluation) if writer else None, meter)
        if wrong := evaluation.not_finite():
            raise NumbersError(
                f"step {step}: {wrong} of {len(evaluation)} pairs have values that are not finite; inspect {path}"
            )

        def summarize() -> dict[str, Any]:
            found = report(evaluation)
            if other:
                found["against"] = compare(evaluation, other, names=(str(path), str(against)))
            summary = path.with_suffix(".json")
            write_json(summary, found)
            return {**found, "files": [str(path), str(summary)]}

        return without_time_limit(world, lambda: summarize() if writer else {}, meter)
    finally:
        engine.close()


def load_step(
    engine: Engine, found: Checkpoint | None, pairs: PairDataset, say: Callable[[str], None]
) -> tuple[Sequence[torch.nn.Module], Reference]:
    """Load this rank's part of the policy, from a checkpoint or from model.path, and open the reference.

    found  the checkpoint; None: load the weights at model.path
    pairs  the pairs to evaluate
    say    called with each line for the log

    *Collectives*: those of loading the weights and of opening the reference.
    """
    trained = engine.load_policy(total_steps=1) if found else None
    chunks = trained.chunks if trained else engine.load_model(engine.config.model.path)
    reference = open_reference(engine, chunks, pairs=[pairs], say=say)
    if found:
        # Checkpoints saved before reference.sync_every was set do not contain reference weights.
        identity, mine = found.manifest["identity"], {"reference": reference_identity(engine)}
        followers = following(reference, engine.config.reference) if keeps_following(identity, mine) else ()
        load_checkpoint(found, trained, engine.arch, engine.groups, following=followers)
    return chunks, reference
