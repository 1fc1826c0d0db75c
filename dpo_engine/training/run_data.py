"""Tokenize a run's pairs once per node, open them on every rank, and check that they have the needed fields."""

import datetime
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from dpo_engine.batching.plan import START, Plan, Position
from dpo_engine.checkpoint.directory import Damaged, committed, read_manifest
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset, shared_pairs
from dpo_engine.data.hub import model_directory
from dpo_engine.data.pair import REFERENCE_LOGPS
from dpo_engine.data.sources import find_shards
from dpo_engine.data.template import reads_clock
from dpo_engine.data.tokenize import build_dataset, cache_file, split_validation
from dpo_engine.data.tokenizer import Tokenizer, load_tokenizer
from dpo_engine.errors import DataError, Interrupted
from dpo_engine.faults import reach
from dpo_engine.model.architecture import read_architecture
from dpo_engine.objective.losses import LOSSES, judged_fields, loss_facts, with_defaults
from dpo_engine.platform.launcher import local_rank
from dpo_engine.platform.long_work import Meter, first_on_node, from_first
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.reporting.progress import Progress, open_progress
from dpo_engine.training.interruption import Interruption

READ_LIMIT = 1 << 30
"""Maximum total size in bytes of the training files that :func:`count_trained` reads."""


@dataclass
class RunData:
    """A run's data: training pairs and the order of their use, held-out pairs, and the tokenizer's digest."""

    train: PairDataset
    validation: PairDataset | None
    plan: Plan
    tokenizer: str  # digest of the tokenizer's files and chat template

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
    """Tokenize the pairs into the cache, on one rank per node, and open them on every rank.

    say           called on the first rank of each node with each line of the report
    interruption  records signals that request a stop; after a signal, a rank that is tokenizing stops at the next
                  opportunity

    *Collectives*: the other ranks wait, without a time limit, for the ranks that tokenize. If one rank fails, all ranks
    raise its error.
    Raises :class:`~dpo_engine.errors.DataError`, which names the file and, if a record is at fault, its line;
    :class:`~dpo_engine.errors.Interrupted` on all ranks if a rank that tokenizes received a signal.
    """
    reach("data")
    progress = _progress(config, groups, interruption)
    train, held_out, tokenizer = first_on_node(
        groups.world, lambda: build_all(config, say, progress), Meter("tokenizing")
    )
    require_columns("data.train", train, config)
    if held_out is not None:
        require_columns("data.validation", held_out, config)
    if local_rank() == 0 and len(train) < config.train.global_batch_size:
        say(
            f"data.train has fewer pairs ({len(train)}) than train.global_batch_size={config.train.global_batch_size}, "
            "so each step uses all pairs"
        )
    return RunData(train, held_out, make_plan(config, train), tokenizer)


def with_template_date(config: Config, world: dist.ProcessGroup | None = None) -> Config:
    """Return the configuration with a fixed date for the run's chat template.

    The date is taken from the newest checkpoint that records a date. Without such a checkpoint, it is today's date. If
    the date were not fixed, a template that writes the date would produce different tokens after midnight. If
    data.template_date is set, or if the template reads no date, the configuration is returned unchanged.

    *Collectives*, if ``world`` is given and no date is set: those of
    :func:`~dpo_engine.platform.long_work.from_first` over ``world``.
    """
    if config.data.template_date:
        return config

    def newest() -> str | None:
        if not reads_clock(model_directory(config.tokenizer_path), config.data.chat_template):
            return None
        dates = [datetime.date.today().isoformat()]
        for directory in committed(config.checkpoint_dir):
            try:
                run = read_manifest(directory)["run"]
            except (OSError, Damaged):
                continue
            dates += [date for date in [run["config"]["data"].get("template_date")] if date]
        return dates[-1]

    date = newest() if world is None else from_first(world, newest, Meter(f"reading {config.checkpoint_dir}"))
    if date is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": date})})


def open_tokenizer(config: Config) -> Tokenizer:
    """Load the run's tokenizer, with its chat template, the template's date, and the size of the embedding."""
    date = config.data.template_date
    fixed = datetime.date.fromisoformat(date) if date else None
    tokenizer = load_tokenizer(config.tokenizer_path, config.data.chat_template, fixed)
    tokenizer.rows = read_architecture(config.model.path).vocab_size
    return tokenizer


def data_facts(data: RunData) -> dict[str, dict[str, str]]:
    """Return facts about the data that must be equal on all ranks; see :mod:`~dpo_engine.training.rank_guard`."""
    named = {"data.train": data.train, "data.validation": data.validation}
    pairs = {name: f"{len(part)} pairs ({part.digest})" for name, part in named.items() if part is not None}
    return {"tokenizer": {"tokenizer": data.tokenizer}, "data": {**pairs, "plan": data.plan.digest}}


def make_plan(config: Config, train: PairDataset, start: Position = START) -> Plan:
    """Return the plan of the run's steps over the pairs ``train``, beginning at the position ``start``."""
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
    """Open the held-out pairs. Read data.train only if data.validation_fraction takes the held-out pairs from it.

    For ``say``, collectives and errors, see :func:`open_data`.
    """
    progress, reads_train = _progress(config, groups), not config.data.validation
    _, held_out, _ = first_on_node(
        groups.world, lambda: build_all(config, say, progress, reads_train=reads_train), Meter("tokenizing")
    )
    require_columns("data.validation", held_out, config)
    return held_out


def _progress(config: Config, groups: ParallelGroups, interruption: Interruption | None = None) -> Progress:
    """Return the progress display for tokenization. Only rank 0 shows the display.

    On every rank, the display also stops the tokenization if this rank received a signal.
    """

    def leave() -> None:
        if interruption and interruption.received:
            name = signal.Signals(interruption.received).name
            raise Interrupted(f"{name}: stopped during tokenization; run the same command to start again")

    return open_progress(config.logging.progress, shown=groups.world.rank() == 0, between=leave)


def build_all(
    config: Config, say: Callable[[str], None], progress: Progress, *, reads_train: bool = True
) -> tuple[PairDataset | None, PairDataset | None, str]:
    """Return the training pairs (None unless ``reads_train``), the held-out pairs or None, and the tokenizer's digest.

    Needs no process group. Raises: as for :func:`open_data`.
    """
    data, tokenizer = config.data, open_tokenizer(config)
    train = held_out = None
    lines = [tokenizer.note] if tokenizer.note else []
    if tokenizer.date:
        lines.append(f"chat template: reads the date, which is {tokenizer.date} for the whole run (data.template_date)")
    if reads_train:
        train, report = build_dataset(
            data.train, tokenizer, data, config.cache_dir, max_pairs=data.max_pairs, progress=progress
        )
        if data.validation_fraction:
            train, held_out = split_validation(train, data.validation_fraction)
            report = f"{report}\n  pairs held out: {len(held_out):,}; left for training: {len(train):,}"
        lines.append(f"training pairs: {report}")
    if data.validation:
        held_out, report = build_dataset(data.validation, tokenizer, data, config.cache_dir, progress=progress)
        lines.append(f"held-out pairs: {report}")
    if local_rank() == 0:
        for line in lines:
            say(line)
    return train, held_out, tokenizer.content


def require_columns(key: str, pairs: PairDataset, config: Config) -> None:
    """Check that every pair has the fields that the run's loss and reference read.

    key   configuration key that the error names

    Raises :class:`~dpo_engine.errors.DataError` if a field is missing.
    """
    loss = LOSSES[config.loss.name]
    facts = loss_facts(loss, with_defaults(loss, config.loss.options))
    readers = dict.fromkeys(judged_fields(facts.needs_data), f"loss {config.loss.name}")
    if config.reference_mode == "dataset" and facts.needs_reference:
        readers |= dict.fromkeys(REFERENCE_LOGPS, "reference.mode dataset")
    for field, reader in readers.items():
        absent = np.flatnonzero(np.isnan(pairs.numbers(field)))
        if len(absent):
            file = pairs.sources[pairs.source_ids[absent[0]]]
            raise DataError(
                f"{file}: {reader} needs {field} in every record of {key}, but {field} is missing in {len(absent)} "
                f"of {len(pairs)} pairs; add {field} to every record, or choose another {reader.split()[0]}"
            )


def count_trained(config: Config, pairs: PairDataset) -> int:
    """Return the number of ``pairs`` that are also training pairs of the run.

    config  the run's own configuration. Even if ``pairs`` come from another source, data.validation and
            data.validation_fraction must keep the values with which the run was trained

    Returns 0 if the cache lacks the training pairs, or if their files have more than `READ_LIMIT` bytes or cannot be
    read.
    """
    data = config.data
    try:
        if sum(find_shards(source.path).size for source in data.train) > READ_LIMIT:
            return 0
        train = PairDataset(cache_file(config.cache_dir, data.train, open_tokenizer(config), data, data.max_pairs))
    except (DataError, pa.ArrowException, OSError, LookupError, ValueError):  # a file is missing or damaged
        return 0
    if data.validation_fraction:
        train, _ = split_validation(train, data.validation_fraction)
    return shared_pairs(train, pairs)
