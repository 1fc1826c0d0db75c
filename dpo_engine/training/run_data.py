"""A run's pairs: tokenised once, opened by every rank, and compared with what the loss reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dpo_engine.batching.plan import START, Plan, Position
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.pair import REFERENCE_LOGPS
from dpo_engine.data.tokenize import build_dataset, split_validation
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import DataError
from dpo_engine.faults import reach
from dpo_engine.objective.losses import LOSSES, judged_fields, loss_facts, with_defaults
from dpo_engine.platform.device import local_rank
from dpo_engine.platform.parallel import ParallelGroups, together

T = TypeVar("T")


@dataclass
class RunData:
    """A run's pairs: what is trained on and in which order, what is held out, and what made them tokens."""

    train: PairDataset
    validation: PairDataset | None
    plan: Plan
    tokenizer: str  # digest of its files and its chat template

    @property
    def all_pairs(self) -> list[PairDataset]:
        """Every pair that the run scores."""
        return [pairs for pairs in (self.train, self.validation) if pairs is not None and len(pairs)]


def open_data(config: Config, groups: ParallelGroups, say: Callable[[str], None] = lambda text: None) -> RunData:
    """Tokenise (once per node, into the cache) and open the pairs.

    say   called with the lines of the report on the first rank of each node

    *Collectives*: all ranks wait for those that tokenise, and leave together if one cannot.
    Raises :class:`~dpo_engine.errors.DataError` naming file and line.
    """
    reach("data")
    train, held_out, tokenizer = _by_node(groups, lambda: _build(config, say))
    require_columns("data.train", train, config)
    if held_out is not None:
        require_columns("data.validation", held_out, config)
    if local_rank() == 0 and len(train) < config.train.global_batch_size:
        say(
            f"data.train has {len(train)} pairs, fewer than train.global_batch_size={config.train.global_batch_size}: "
            "each step takes all of them"
        )
    return RunData(train, held_out, make_plan(config, train), tokenizer)


def data_facts(data: RunData) -> dict[str, dict[str, str]]:
    """What all ranks must have found alike in the files; see :mod:`~dpo_engine.training.rank_guard`."""
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
    """The pairs to evaluate on; records of data.train are read only where some of them are held out.

    say, *Collectives*, Raises  as for :func:`open_data`
    """
    _, held_out, _ = _by_node(groups, lambda: _build(config, say, reads_train=not config.data.validation))
    require_columns("data.validation", held_out, config)
    return held_out


def _by_node(groups: ParallelGroups, build: Callable[[], T]) -> T:
    """What ``build`` gives, after it has filled the cache on the first rank of each node."""
    first = local_rank() == 0
    made = together(groups.world, build if first else lambda: None)
    opened = together(groups.world, lambda: None if first else build())
    return made if first else opened


def _build(
    config: Config, say: Callable[[str], None], *, reads_train: bool = True
) -> tuple[PairDataset | None, PairDataset | None, str]:
    """The pairs to train on, if they are asked for, those held out, if there are any, and the tokenizer's digest."""
    data, tokenizer = config.data, load_tokenizer(config.tokenizer_path, config.data.chat_template)
    train = held_out = None
    reports = []
    if reads_train:
        train, report = build_dataset(data.train, tokenizer, data, config.cache_dir)
        if data.validation_fraction:
            train, held_out = split_validation(train, data.validation_fraction)
            report = f"{report}\n  held out of them: {len(held_out):,} pairs, {len(train):,} are trained on"
        reports.append(("training pairs", report))
    if data.validation:
        held_out, report = build_dataset(data.validation, tokenizer, data, config.cache_dir)
        reports.append(("held-out pairs", report))
    if local_rank() == 0:
        for name, report in reports:
            say(f"{name}: {report}")
    return train, held_out, tokenizer.content


def require_columns(key: str, pairs: PairDataset, config: Config) -> None:
    """Raises :class:`~dpo_engine.errors.DataError` when a pair lacks a field that the run's loss or reference reads."""
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
                f"{file}: {reader} reads {field} of every record of {key}, and {len(absent)} of {len(pairs)} pairs "
                "have none; give it in each, or choose another"
            )
