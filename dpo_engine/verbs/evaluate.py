"""``dpo-engine eval``: evaluate a checkpoint of a run, or the run's initial weights, on held-out pairs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_engine.checkpoint.load import Checkpoint, load_checkpoint
from dpo_engine.checkpoint.resume import keeps_following
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.errors import ConfigError, NumbersError
from dpo_engine.model.cuda_graphs import without_graphs
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.reporting.comparison import compare, report
from dpo_engine.reporting.pair_file import read_evaluation, write_evaluation, write_json
from dpo_engine.scoring.reference import Reference
from dpo_engine.training.engine import Engine
from dpo_engine.training.evaluate import evaluation_path, held_out_evaluator, judged_pairs
from dpo_engine.training.metrics import source_names
from dpo_engine.training.out_of_memory import explained
from dpo_engine.training.references import following, open_reference, reference_identity
from dpo_engine.training.run_data import count_trained, open_held_out
from dpo_engine.training.start import saved
from dpo_engine.training.token_samples import sample_tokens, unknown_reference
from dpo_engine.verbs import console

NAME_LENGTH = 100
"""Maximum number of characters that a default file name takes from the names of the data sources."""


def evaluate(
    config: Config,
    *,
    step: int | None = None,
    data: str | Sequence[str | Mapping[str, Any]] | None = None,
    to: str | None = None,
    against: str | None = None,
    tokens: int | None = None,
    say: Callable[[str], None] = console.say,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run on held-out pairs, in the layout that ``config`` sets, and write the results.

    step     step of the checkpoint; None: the newest checkpoint; 0: the weights at model.path
    data     sources of pairs: a string of paths separated by commas, or a list whose items have any form that
             ``data.validation`` accepts; None: the run's own held-out pairs
    to       Parquet file to write; None: a file in train.output_dir, named after the step and ``data``
    against  Parquet file of another evaluation to compare with
    tokens   number of pairs whose token log-probabilities are written to a file next to the Parquet file; None: no file
    say      called with each line for the log

    Returns  on rank 0, the report, with the key ``against`` if a comparison was requested, and the key ``files`` with
             the paths of the written files; on the other ranks, an empty dictionary

    Raises :class:`~dpo_engine.errors.EngineError` on all ranks if the evaluation fails. If values of a pair are not
    finite, the error is a :class:`~dpo_engine.errors.NumbersError`, and the Parquet file is written first.
    """
    own, name = config, ""
    if data is not None:
        config = with_data(config, data)
        name = "_".join(source_names([source.path for source in config.data.validation]))[:NAME_LENGTH]
    if config.data.validation is None and not config.data.validation_fraction:
        raise ConfigError(
            "data.validation=null: evaluation needs validation data; set data.validation or data.validation_fraction, "
            "or pass --data FILE"
        )
    if to is not None and not to.endswith(".parquet"):
        raise ConfigError(f"--to={to}: must end with .parquet; pass --to FILE.parquet (the summary goes to FILE.json)")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--tokens={tokens}: must be at least 1; pass the number of pairs whose tokens are written")
    engine = Engine.open(without_graphs(config))
    config = engine.config
    try:
        world = engine.groups.world
        writer = world.rank() == 0
        other = without_time_limit(
            world, lambda: read_evaluation(against) if against and writer else None, Meter(f"reading {against}")
        )
        pairs = open_held_out(config, engine.groups, say)
        if data is not None:
            date = {"template_date": config.data.template_date}
            own = own.model_copy(update={"data": own.data.model_copy(update=date)})
            trained = without_time_limit(
                world, lambda: count_trained(own, pairs) if writer else 0, Meter("reading the training pairs")
            )
            if trained:
                say(f"held-out pairs: {trained:,} of {len(pairs):,} are also training pairs of the run")
        engine.settle_batches(pairs)
        way_out = "evaluate model.path with --step 0"
        found = None if step == 0 else saved(engine, step, say, way_out=way_out)
        step = found.step if found else 0
        path = Path(to) if to else evaluation_path(config, step, name)
        if name and not to:
            without_time_limit(
                world, lambda: require_same_data(path, pairs, data) if writer else None, Meter(f"reading {path}")
            )
        with explained(engine, scoring=True):
            chunks, reference = load_step(engine, found, pairs, say)
            evaluator = held_out_evaluator(engine, pairs, reference)
            evaluator.evaluate(chunks)
        evaluation = judged_pairs(engine, evaluator, pairs, step)
        meter = Meter(f"writing {path}")
        without_time_limit(world, lambda: write_evaluation(path, evaluation) if writer else None, meter)
        if wrong := evaluation.not_finite():
            raise NumbersError(
                f"step {step}: values are not finite in {wrong} of {len(evaluation)} pairs; inspect {path}"
            )

        files = [str(path), str(path.with_suffix(".json"))]
        if tokens:
            asked = {"count": min(tokens, len(pairs)), "path": path}
            files.append(str(sample_tokens(engine, chunks, reference, pairs, evaluation, **asked)))
            if line := unknown_reference(engine):
                say(line)

        def summarize() -> dict[str, Any]:
            found = report(evaluation)
            if other:
                found["against"] = compare(evaluation, other, names=(str(path), str(against)))
            write_json(path.with_suffix(".json"), found)
            return {**found, "files": files}

        return without_time_limit(world, lambda: summarize() if writer else {}, meter)
    finally:
        engine.close()


def with_data(config: Config, data: str | Sequence[str | Mapping[str, Any]]) -> Config:
    """Return the run's configuration with other sources of held-out pairs.

    data   as for :func:`evaluate`

    Raises :class:`~dpo_engine.errors.ConfigError` if the sources are not valid as ``data.validation``.
    """
    sources = data.split(",") if isinstance(data, str) else list(data)
    raw = config.model_dump(mode="json")
    return Config.parse({**raw, "data": {**raw["data"], "validation": sources, "validation_fraction": 0.0}})


def require_same_data(path: Path, pairs: PairDataset, data: str) -> None:
    """Raise :class:`~dpo_engine.errors.ConfigError` if the file ``path`` contains an evaluation of other data.

    The default file name is made from the names of the data files without their directories, so it can be the same for
    different data.
    """
    if path.exists() and read_evaluation(path).facts.get("data") != pairs.digest:
        raise ConfigError(f"--data={data}: {path} contains an evaluation of other data; pass --to FILE.parquet")


def load_step(
    engine: Engine, found: Checkpoint | None, pairs: PairDataset, say: Callable[[str], None]
) -> tuple[Sequence[torch.nn.Module], Reference]:
    """Load this rank's part of the policy, from a checkpoint or from model.path, and open the reference.

    found  the checkpoint; None: load the weights at model.path
    pairs  the pairs to evaluate
    say    called with each line for the log

    *Collectives*: those of loading the weights, of opening the reference and, for a checkpoint, of
    :func:`~dpo_engine.training.references.reference_identity`.
    """
    trained = engine.load_policy(total_steps=1) if found else None
    chunks = trained.chunks if trained else engine.load_start()
    reference = open_reference(engine, chunks, pairs=[pairs], say=say)
    if found:
        # Checkpoints saved before reference.sync_every was set do not contain reference weights.
        identity, mine = found.manifest["identity"], {"reference": reference_identity(engine)}
        followers = following(reference, engine.config.reference) if keeps_following(identity, mine) else ()
        load_checkpoint(found, trained, engine.arch, engine.groups, following=followers)
    return chunks, reference
