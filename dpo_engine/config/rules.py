"""What the keys of a run mean together: contradictions, keys that would do nothing, and the options of its loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.config.sections import BadStepsConfig, BatchConfig, LossConfig, ReferenceConfig, TrainConfig
from dpo_engine.objective.losses import LOSSES, LossFacts, loss_facts, loss_options, with_defaults
from dpo_engine.objective.options import option_problems
from dpo_engine.wording import join, nearest, show

Rule = tuple[tuple[str, ...], str]


def contradictions(config: Config, broken: frozenset[str] = frozenset()) -> list[str]:
    """Keys that cannot both hold, and keys that would do nothing as the others stand.

    broken  keys whose values are not the user's: nothing is said about what depends on them
    """
    found = []
    rules = (
        *(_model_rules, _batch_rules, _data_rules, _loss_rules, _optim_rules, _train_rules),
        *(_checkpoint_rules, _bad_steps_rules),
    )
    for keys, rule in (found for rules_of in rules for found in rules_of(config)):
        if not any(is_broken(key, broken) for key in keys):
            found.append(f"{keys[0]}={show(value_at(config, keys[0]))}: {rule}")
    return found


def is_broken(key: str, broken: frozenset[str]) -> bool:
    """Whether `key`, something inside it, or a section around it, is broken."""
    return any(f"{bad}.".startswith(f"{key}.") or f"{key}.".startswith(f"{bad}.") for bad in broken) or any(
        bad.startswith(f"{key}[") for bad in broken
    )


def value_at(config: Config, key: str) -> Any:
    """The value of a dotted key; `data.train[0].weight` for items of lists."""
    value: Any = config
    for part in key.replace("[", ".").replace("]", "").split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def _model_rules(config: Config) -> Iterator[Rule]:
    parallel, reference = config.parallel, config.reference
    if parallel.vpp is not None and parallel.pp == 1:
        yield ("parallel.vpp", "parallel.pp"), "interleaves pipeline stages, and parallel.pp is 1; leave it out"
    if parallel.sequence_parallel is True and parallel.tp == 1:
        yield (
            ("parallel.sequence_parallel", "parallel.tp"),
            "splits activations over tensor-parallel ranks, and parallel.tp is 1; leave it out",
        )
    yield from _reference_rules(config)
    if reference.path is not None and reference.mode == "none":
        yield (
            ("reference.path", "reference.mode"),
            "is not read when reference.mode is none; leave it out, or set reference.mode=resident",
        )
    facts = facts_of(config.loss)
    if reference.mode == "none" and facts and facts.needs_reference:
        free = "reference_free" in loss_options(LOSSES[config.loss.name])
        yield (
            ("reference.mode", "loss"),
            f"loss {config.loss.name} compares with a reference; set reference.mode=resident"
            + (" or loss.reference_free=true" if free else ""),
        )


READ_BY = {
    "sync_every": ("resident",),
    "sync_alpha": ("resident",),
    "ahead": ("offloaded",),
    "store": ("stored",),
    "missing": ("stored",),
    "verify": ("stored", "dataset"),
}
"""Keys of ``reference`` that only some modes read."""


def _reference_rules(config: Config) -> Iterator[Rule]:
    reference, defaults = config.reference, ReferenceConfig()
    for key, modes in READ_BY.items():
        if getattr(reference, key) != getattr(defaults, key) and reference.mode not in modes:
            yield (
                (f"reference.{key}", "reference.mode"),
                f"is read when reference.mode is {join(modes, 'or')}, and it is {reference.mode}; leave it out",
            )
    if reference.sync_alpha != defaults.sync_alpha and reference.mode == "resident" and not reference.sync_every:
        yield (
            ("reference.sync_alpha", "reference.sync_every"),
            "moves a reference that never moves; give reference.sync_every, or leave it out",
        )
    if reference.path is not None and reference.mode == "dataset" and not reference.verify:
        yield (
            ("reference.path", "reference.mode", "reference.verify"),
            "is not read when the records' log-probabilities are trusted (reference.verify=0); leave it out",
        )
    facts = facts_of(config.loss)
    if facts and not facts.needs_reference and reference.mode not in ("resident", "none"):
        yield (
            ("reference.mode", "loss"),
            f"loss {config.loss.name} reads no reference; leave it out, or set reference.mode=none",
        )
    if config.loss.ld_alpha is not None and reference.mode == "dataset" and facts and facts.needs_reference:
        yield (
            ("loss.ld_alpha", "reference.mode"),
            "needs the reference's log-probabilities token by token, and records have whole sums; leave it out, or set "
            "reference.mode=stored",
        )
    if facts and not facts.needs_reference and reference.sync_every:
        yield (
            ("reference.sync_every", "loss"),
            f"loss {config.loss.name} reads no reference; leave it out",
        )


def _batch_rules(config: Config) -> Iterator[Rule]:
    batch, defaults = config.batch, BatchConfig()
    for key in ("share", "tokens_per_micro_batch"):
        if batch.layout == "stacked" and getattr(batch, key) != getattr(defaults, key):
            yield (
                (f"batch.{key}", "batch.layout"),
                "is read when batch.layout is tree or auto, and it is stacked; leave it out",
            )
    sized = config.batch.layout == "tree" and config.batch.tokens_per_micro_batch is not None
    if sized and config.train.micro_batch_size != TrainConfig.model_fields["micro_batch_size"].default:
        yield (
            ("train.micro_batch_size", "batch.layout", "batch.tokens_per_micro_batch"),
            f"sizes nothing where batch.tokens_per_micro_batch={config.batch.tokens_per_micro_batch} does; keep one of "
            "them",
        )


def _data_rules(config: Config) -> Iterator[Rule]:
    data = config.data
    if data.validation_fraction and data.validation is not None:
        yield (
            ("data.validation_fraction", "data.validation"),
            "would hold out pairs of data.train, and data.validation is given; keep one of them",
        )
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        yield (
            ("data.max_prompt_length", "data.max_length"),
            f"limits nothing that data.max_length={data.max_length} does not; lower it, or leave it out",
        )
    if data.seed and not data.shuffle:
        yield ("data.seed", "data.shuffle"), "orders nothing when data.shuffle is false; leave it out"
    if len(data.train) == 1 and data.train[0].weight != 1:
        yield ("data.train[0].weight", "data.train"), "has no other source to be weighed against; leave it out"


def _loss_rules(config: Config) -> Iterator[Rule]:
    loss, facts = config.loss, facts_of(config.loss)
    if facts and facts.likelihood_term and loss.ld_alpha is not None:
        yield (
            ("loss.ld_alpha", "loss"),
            f"loss {loss.name} adds a likelihood, of which every token counts alike; leave it out, or leave that out",
        )
    if facts and facts.couples_pairs and loss.use_weighting:
        yield (
            ("loss.use_weighting", "loss"),
            f"is a factor of each pair's own loss, and loss {loss.name} couples all pairs of a step; leave it out",
        )


def _optim_rules(config: Config) -> Iterator[Rule]:
    optim, max_steps = config.optim, config.train.max_steps
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        yield (
            ("optim.warmup_steps", "optim.warmup_ratio"),
            f"optim.warmup_ratio={optim.warmup_ratio} is given too; keep one of them",
        )
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield (
            ("optim.decay_steps", "optim.schedule"),
            f"is read by schedule wsd only, and optim.schedule is {optim.schedule}; leave it out",
        )
    if optim.min_lr and optim.schedule == "constant":
        yield ("optim.min_lr", "optim.schedule"), "the constant schedule never falls; leave it out"
    if optim.min_lr > optim.lr:
        yield ("optim.min_lr", "optim.lr"), f"must be at most optim.lr={optim.lr}; lower it"
    if max_steps is not None:
        shaped = (optim.warmup_steps or 0) + (optim.decay_steps or 0)
        if optim.warmup_steps and optim.warmup_steps >= max_steps:
            yield (
                ("optim.warmup_steps", "train.max_steps"),
                f"must be less than train.max_steps={max_steps}, or the run ends before it; lower it",
            )
        elif optim.decay_steps and shaped > max_steps:
            yield (
                ("optim.decay_steps", "optim.warmup_steps", "train.max_steps"),
                f"with the warm-up must be at most train.max_steps={max_steps}; use at most "
                f"{max_steps - (optim.warmup_steps or 0)}",
            )


def _train_rules(config: Config) -> Iterator[Rule]:
    train, data = config.train, config.data
    if train.micro_batch_size > train.global_batch_size:
        yield (
            ("train.micro_batch_size", "train.global_batch_size"),
            f"must be at most train.global_batch_size={train.global_batch_size}; lower it",
        )
    if data.validation is None and not data.validation_fraction:
        held_out = ("data.validation", "data.validation_fraction")
        rule = "there is nothing to evaluate on; give data.validation or data.validation_fraction, or leave it out"
        if train.eval_interval:
            yield ("train.eval_interval", *held_out), rule
        if train.eval_at_start:
            yield ("train.eval_at_start", *held_out), rule


def _checkpoint_rules(config: Config) -> Iterator[Rule]:
    checkpoint = config.checkpoint
    if checkpoint.accept_changes and not checkpoint.resume:
        yield (
            ("checkpoint.accept_changes", "checkpoint.resume"),
            "is read when a run continues, and checkpoint.resume is false; leave it out",
        )


def _bad_steps_rules(config: Config) -> Iterator[Rule]:
    window = BadStepsConfig.model_fields["spike_window"].default
    if config.bad_steps.spike_window != window and config.bad_steps.spike_sigma is None:
        yield (
            ("bad_steps.spike_window", "bad_steps.spike_sigma"),
            "measures nothing when bad_steps.spike_sigma is null; give it, or leave this out",
        )


def reads_reference(config: Config) -> bool:
    """Whether the run has a reference: its mode is not none, and its loss reads one."""
    facts = facts_of(config.loss)
    return config.reference.mode != "none" and (facts is None or facts.needs_reference)


def facts_of(loss: LossConfig) -> LossFacts | None:
    """What the loss of a run says about itself under its options; None where something is wrong with them."""
    if loss.name not in LOSSES or option_problems(loss.name, loss.options, "loss"):
        return None
    return loss_facts(LOSSES[loss.name], with_defaults(LOSSES[loss.name], loss.options))


def loss_problems(config: Config) -> list[str]:
    """Everything wrong with `loss`: its name, its options' names and types, and what the loss itself refuses."""
    name = config.loss.name
    if name not in LOSSES:
        near = nearest(name, list(LOSSES))
        hint = f"did you mean {near}? " if near else ""
        return [
            f"loss.name={name}: no such loss; {hint}registered are {join(sorted(LOSSES), 'and')}"
            + ("" if config.plugins else " (plugins: [a.module] adds more)")
        ]
    return option_problems(name, config.loss.options, "loss")
