"""A run's pairs: tokenized once per node, opened by every rank, and checked against what the loss reads."""

import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpo_engine.batching.plan import START, Plan, Position
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.pair import REFERENCE_LOGPS
from dpo_engine.data.tokenize import build_dataset, split_validation
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import DataError, Interrupted
from dpo_engine.faults import reach
from dpo_engine.objective.losses import LOSSES, judged_fields, loss_facts, with_defaults
from dpo_engine.platform.device import local_rank
from dpo_engine.platform.long_work import first_on_node
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.reporting.progress import Progress, open_progress
from dpo_engine.training.interruption import Interruption


@dataclass
class RunData:
    """A run's data: training pairs and their order, held-out pairs, and the tokenizer's digest."""

    train: PairDataset
    validation: PairDataset | None
    plan: Plan
    tokenizer: str  # digest of its files and its chat template

    @property
    def all_pairs(self) -> list[PairDataset]:
        """The nonempty data sets that the run scores."""
        return [pairs for pairs in (self.train, self.validation) if pairs is not None and len(pairs)]


def open_data(
    config: Config,
    groups: ParallelGroups,
    say: Callable[[str], None] = lambda text: None,
    interruption: Interruption | None = None,
) -> RunData:
    """Tokenize the pairs, once per node into the cache, and open them on every rank.

    say           called with the lines of the report, on the first rank of each node
    interruption  records signals that ask for a stop; a rank that tokenizes stops soon

    *Collectives*: all ranks wait for those that tokenize, without a time limit, and leave together if one fails.
    Raises :class:`~dpo_engine.errors.DataError` naming file and line;
    :class:`~dpo_engine.errors.Interrupted` on all ranks if a rank that tokenizes received a signal.
    """
    reach("data")
    progress = _progress(config, groups, interruption)
    train, held_out, tokenizer = first_on_node(groups, lambda: build_all(config, say, progress))
    require_columns("data.train", train, config)
    if held_out is not None:
        require_columns("data.validation", held_out, config)
    if local_rank() == 0 and len(train) < config.train.global_batch_size:
        say(
            f"data.train has {len(train)} pairs, fewer than train.global_batch_size={config.train.global_batch_size}: "
            "each step uses all of them"
        )
    return RunData(train, held_out, make_plan(config, train), tokenizer)


def data_facts(data: RunData) -> dict[str, dict[str, str]]:
    """Facts about the data that must be equal on all ranks; see :mod:`~dpo_engine.training.rank_guard`."""
    named = {"data.train": data.train, "data.validation": data.validation}
    pairs = {name: f"{len(part)} pairs ({part.digest})" for name, part in named.items() if part is not None}
    return {"tokenizer": {"tokenizer": data.tokenizer}, "data": {**pairs, "plan": data.plan.digest}}


def make_plan(config: Config, train: PairDataset, start: Position = START) -> Plan:
    """The run's steps over ``train``, from ``start`` on."""
    return Plan(
        train,
        weights=[source.weight for source in config.data.train],
        global_batch_size=config.train.global_batch_size,
        seed=config.data.seed,
        shuffle=config.data.shuffle,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        group_by_prompt=config.data.group_by_prompt,
        start=start,
    )


def open_held_out(config: Config, groups: ParallelGroups, say: Callable[[str], None]) -> PairDataset:
    """Open the pairs to evaluate on. Reads data.train only if the held-out pairs are split off from it.

    say, *Collectives*, Raises: as for :func:`open_data`.
    """
    progress, reads_train = _progress(config, groups), not config.data.validation
    _, held_out, _ = first_on_node(groups, lambda: build_all(config, say, progress, reads_train=reads_train))
    require_columns("data.validation", held_out, config)
    return held_out


def _progress(config: Config, groups: ParallelGroups, interruption: Interruption | None = None) -> Progress:
    """Progress of tokenizing: shown on the first rank of the run, stopped by a signal on any rank."""

    def leave() -> None:
        if interruption and interruption.received:
            name = signal.Signals(interruption.received).name
            raise Interrupted(f"{name}: stopped while the data was tokenized; run the same command to start again")

    return open_progress(config.logging.progress, shown=groups.world.rank() == 0, between=leave)


def build_all(
    config: Config, say: Callable[[str], None], progress: Progress, *, reads_train: bool = True
) -> tuple[PairDataset | None, PairDataset | None, str]:
    """Build the training pairs (None unless ``reads_train``), the held-out pairs (or None), the tokenizer's digest.

    Needs no process group. Raises: as for :func:`open_data`.
    """
    data, tokenizer = config.data, load_tokenizer(config.tokenizer_path, config.data.chat_template)
    train = held_out = None
    reports = []
    if reads_train:
        train, report = build_dataset(data.train, tokenizer, data, config.cache_dir, progress)
        if data.validation_fraction:
            train, held_out = split_validation(train, data.validation_fraction)
            report = f"{report}\n  held out: {len(held_out):,} pairs; left for training: {len(train):,}"
        reports.append(("training pairs", report))
    if data.validation:
        held_out, report = build_dataset(data.validation, tokenizer, data, config.cache_dir, progress)
        reports.append(("held-out pairs", report))
    if local_rank() == 0:
        for name, report in reports:
            say(f"{name}: {report}")
    return train, held_out, tokenizer.content


def require_columns(key: str, pairs: PairDataset, config: Config) -> None:
    """Check that every pair has the fields that the run's loss and reference read.

    Raises :class:`~dpo_engine.errors.DataError` when a field is missing.
    """
    loss = LOSSES[config.loss.name]
    facts = loss_facts(loss, with_defaults(loss, config.loss.options))
    readers = dict.fromkeys(judged_fields(facts.needs_data), f"loss {config.loss.name}")
    if config.reference.mode == "dataset" and facts.needs_reference:
        readers |= dict.fromkeys(REFERENCE_LOGPS, "reference.mode dataset")
    for field, reader in readers.items():
        absent = np.flatnonzero(np.isnan(pairs.numbers(field)))
        if len(absent):
            file = pairs.sources[pairs.source_ids[absent[0]]]
            raise DataError(
                f"{file}: {reader} needs {field} in every record of {key}, but {len(absent)} of {len(pairs)} pairs "
                f"lack it; add it to every record, or choose another {reader.split()[0]}"
            )
