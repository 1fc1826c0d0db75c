"""A run's pairs: tokenised once, opened by every rank, and compared with what the loss reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_engine.config import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.formats import REFERENCE_LOGPS
from dpo_engine.data.plan import Plan
from dpo_engine.data.tokenize import build_dataset, split_validation
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import DataError
from dpo_engine.objective.losses import LOSSES, judged_fields, loss_facts, with_defaults
from dpo_engine.platform.device import local_rank
from dpo_engine.platform.parallel import ParallelGroups, together


@dataclass
class RunData:
    """A run's pairs: what is trained on and in which order, and what is held out."""

    train: PairDataset
    validation: PairDataset | None
    plan: Plan

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
    tokenizer = load_tokenizer(config.tokenizer_path, config.data.chat_template)

    def build() -> tuple[PairDataset, PairDataset | None]:
        train, report = build_dataset(config.data.train, tokenizer, config.data, config.cache_dir)
        held_out = None
        reports = [("training pairs", report)]
        if config.data.validation:
            held_out, report = build_dataset(config.data.validation, tokenizer, config.data, config.cache_dir)
            reports.append(("held-out pairs", report))
        elif config.data.validation_fraction:
            train, held_out = split_validation(train, config.data.validation_fraction)
            report = f"{report}\n  held out of them: {len(held_out):,} pairs, {len(train):,} are trained on"
            reports = [("training pairs", report)]
        if local_rank() == 0:
            for name, report in reports:
                say(f"{name}: {report}")
        return train, held_out

    if local_rank() == 0:
        train, held_out = together(groups.world, build)
    else:
        together(groups.world, lambda: None)
        train, held_out = build()
    facts = loss_facts(LOSSES[config.loss.name], with_defaults(LOSSES[config.loss.name], config.loss.options))
    for key, pairs in (("data.train", train), ("data.validation", held_out)):
        if pairs is not None:
            require_columns(key, pairs, f"loss {config.loss.name}", judged_fields(facts.needs_data))
            if config.reference.mode == "dataset" and facts.needs_reference:
                require_columns(key, pairs, "reference.mode dataset", REFERENCE_LOGPS)
    plan = Plan(
        train,
        weights=[source.weight for source in config.data.train],
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.data.seed,
        shuffle=config.data.shuffle,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
    )
    return RunData(train, held_out, plan)


def require_columns(key: str, pairs: PairDataset, reader: str, fields: Sequence[str]) -> None:
    """Raises :class:`~dpo_engine.errors.DataError` when a pair lacks a field that ``reader`` reads."""
    for field in fields:
        absent = np.flatnonzero(np.isnan(pairs.numbers(field)))
        if len(absent):
            file = pairs.sources[pairs.source_ids[absent[0]]]
            raise DataError(
                f"{file}: {reader} reads {field} of every record of {key}, and {len(absent)} of {len(pairs)} pairs "
                "have none; give it in each, or choose another"
            )
