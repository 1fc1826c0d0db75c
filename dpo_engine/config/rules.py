"""Rules that involve several keys of a run: find contradictions, keys without effect, and invalid loss options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_engine.config.adapter_rules import Rule, adapter_rules
from dpo_engine.config.run import Config
from dpo_engine.config.sections import BadStepsConfig, LossConfig, ReferenceConfig
from dpo_engine.objective.losses import LOSSES, LossFacts, loss_facts, loss_options, with_defaults
from dpo_engine.objective.options import all_options, option_problems
from dpo_engine.options import name_problem
from dpo_engine.wording import join, show


def contradictions(config: Config, broken: frozenset[str] = frozenset()) -> list[str]:
    """List keys that contradict each other and keys that have no effect, one line per problem.

    broken  keys whose values were invalid and have been replaced or ignored, and keys that the current command does not
            use; rules that read any of these keys are not checked
    """
    found = []
    rules = (
        *(_model_rules, _batch_rules, _data_rules, _loss_rules, _optim_rules, _train_rules),
        *(_checkpoint_rules, _bad_steps_rules, _profile_rules, adapter_rules),
    )
    for keys, rule in (found for rules_of in rules for found in rules_of(config)):
        if not any(is_broken(key, broken) for key in keys):
            found.append(f"{keys[0]}={show(value_at(config, keys[0]))}: {rule}")
    return found


def is_broken(key: str, broken: frozenset[str]) -> bool:
    """Whether `key`, a key inside `key`, or a section that contains `key` is in `broken`."""
    return any(f"{bad}.".startswith(f"{key}.") or f"{key}.".startswith(f"{bad}.") for bad in broken) or any(
        bad.startswith(f"{key}[") for bad in broken
    )


def value_at(config: Config, key: str) -> Any:
    """Return the value of a dotted key. A list item is written as in `data.train[0].weight`."""
    value: Any = config
    for part in key.replace("[", ".").replace("]", "").split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def _model_rules(config: Config) -> Iterator[Rule]:
    parallel, reference = config.parallel, config.reference
    if parallel.vpp is not None and parallel.pp == 1:
        yield ("parallel.vpp", "parallel.pp"), "requires parallel.pp >= 2, but it is 1; remove parallel.vpp"
    if parallel.layers is not None and parallel.pp == 1:
        yield ("parallel.layers", "parallel.pp"), "requires parallel.pp >= 2, but it is 1; remove parallel.layers"
    elif isinstance(parallel.layers, tuple) and len(parallel.layers) != parallel.pp * (parallel.vpp or 1):
        yield (
            ("parallel.layers", "parallel.pp", "parallel.vpp"),
            f"must have {parallel.pp * (parallel.vpp or 1)} numbers, one for each model chunk; correct it",
        )
    if config.model.attention == "te" and config.model.spec == "native":
        yield ("model.attention", "model.spec"), "requires Transformer Engine's layers; set model.spec=te"
    if config.model.attention == "te" and config.train.deterministic:
        yield (
            ("model.attention", "train.deterministic"),
            "Transformer Engine has deterministic kernels for small micro-batches only; set train.deterministic=false "
            "or model.attention=auto",
        )
    if config.model.flash_attention != 2 and config.model.dtype == "fp32":
        yield ("model.flash_attention", "model.dtype"), "requires model.dtype=bf16; set model.flash_attention=2"
    if config.model.cuda_graphs:
        yield from _graph_rules(config)
    if parallel.sequence_parallel is True and parallel.tp == 1:
        yield (
            ("parallel.sequence_parallel", "parallel.tp"),
            "requires parallel.tp >= 2, but it is 1; remove parallel.sequence_parallel",
        )
    yield from _reference_rules(config)
    if reference.path is not None and reference.mode == "none":
        yield (
            ("reference.path", "reference.mode"),
            "is not used when reference.mode is none; remove reference.path, or set reference.mode=resident",
        )
    facts = facts_of(config.loss)
    if reference.mode == "none" and facts and facts.needs_reference:
        free = "reference_free" in loss_options(LOSSES[config.loss.name])
        yield (
            ("reference.mode", "loss"),
            f"loss {config.loss.name} needs a reference; set reference.mode=resident"
            + (" or loss.reference_free=true" if free else ""),
        )


def _graph_rules(config: Config) -> Iterator[Rule]:
    key, asked = "model.cuda_graphs", config.megatron
    if config.batch.layout != "tree":
        yield (
            (key, "batch.layout"),
            f"requires rows of one size, which only the tree layout has, but batch.layout is {config.batch.layout}; "
            "set batch.layout=tree, or remove model.cuda_graphs",
        )
    if config.model.recompute != "none":
        yield (
            (key, "model.recompute"),
            f"what a graph computes cannot be recomputed, but model.recompute is {config.model.recompute}; set "
            "model.recompute=none, or remove model.cuda_graphs",
        )
    if asked.fp8_recipe:
        yield (key, "megatron.transformer"), "has never been tested with megatron.transformer.fp8; remove one of them"
    if asked.tp_comm_overlap:
        yield (
            (key, "megatron.transformer"),
            "has never been tested with megatron.transformer.tp_comm_overlap; remove one of them",
        )


READ_BY = {
    "sync_every": ("resident", "shared"),
    "sync_alpha": ("resident", "shared"),
    "ahead": ("offloaded",),
    "store": ("stored",),
    "missing": ("stored",),
    "verify": ("stored", "dataset"),
}
"""For each key of ``reference`` that applies only to some modes, the modes to which the key applies."""


def _reference_rules(config: Config) -> Iterator[Rule]:
    reference, mode, defaults = config.reference, config.reference_mode, ReferenceConfig()
    for key, modes in READ_BY.items():
        if getattr(reference, key) != getattr(defaults, key) and mode not in modes:
            yield (
                (f"reference.{key}", "reference.mode"),
                f"applies only when reference.mode is {join(modes, 'or')}, but this run's mode is {mode}; remove "
                f"reference.{key}",
            )
    if reference.sync_alpha != defaults.sync_alpha and mode in ("resident", "shared") and not reference.sync_every:
        yield (
            ("reference.sync_alpha", "reference.sync_every"),
            "has no effect without reference.sync_every; set reference.sync_every, or remove reference.sync_alpha",
        )
    if reference.path is not None and reference.mode == "dataset" and not reference.verify:
        yield (
            ("reference.path", "reference.mode", "reference.verify"),
            "is not used, because reference.verify=0 turns off the check of the records' log-probabilities; remove "
            "reference.path",
        )
    facts = facts_of(config.loss)
    if facts and not facts.needs_reference and reference.mode not in ("auto", "resident", "none"):
        yield (
            ("reference.mode", "loss"),
            f"loss {config.loss.name} does not use a reference; remove reference.mode, or set reference.mode=none",
        )
    if config.loss.ld_alpha is not None and reference.mode == "dataset" and facts and facts.needs_reference:
        yield (
            ("loss.ld_alpha", "reference.mode"),
            "requires the reference's log-probability of each token, but with reference.mode=dataset, the records "
            "contain only sums; remove loss.ld_alpha, or set reference.mode=stored",
        )
    if facts and not facts.needs_reference and reference.sync_every:
        yield (
            ("reference.sync_every", "loss"),
            f"loss {config.loss.name} does not use a reference; remove reference.sync_every",
        )


def _batch_rules(config: Config) -> Iterator[Rule]:
    batch = config.batch
    if batch.layout == "stacked" and not batch.share:
        yield (
            ("batch.share", "batch.layout"),
            "applies only when batch.layout is tree or auto, but it is stacked; remove batch.share",
        )
    if batch.tokens_per_micro_batch != "auto" and config.train.micro_batch_size is not None:
        yield (
            ("train.micro_batch_size", "batch.tokens_per_micro_batch"),
            f"cannot be combined with batch.tokens_per_micro_batch={batch.tokens_per_micro_batch}; keep one of them",
        )


def _data_rules(config: Config) -> Iterator[Rule]:
    data = config.data
    if data.validation_fraction and data.validation is not None:
        yield (
            ("data.validation_fraction", "data.validation"),
            "cannot be combined with data.validation; keep one of them",
        )
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        yield (
            ("data.max_prompt_length", "data.max_length"),
            f"has an effect only if it is less than data.max_length={data.max_length}; lower or remove this key",
        )
    if data.seed and not data.shuffle:
        yield ("data.seed", "data.shuffle"), "has no effect when data.shuffle is false; remove data.seed"
    if len(data.train) == 1 and data.train[0].weight != 1:
        yield ("data.train[0].weight", "data.train"), "has no effect with a single data source; remove the weight"


def _loss_rules(config: Config) -> Iterator[Rule]:
    loss, facts = config.loss, facts_of(config.loss)
    if facts and facts.likelihood_term and loss.ld_alpha is not None:
        yield (
            ("loss.ld_alpha", "loss"),
            f"loss {loss.name} has a likelihood term, in which all tokens have equal weight; remove loss.ld_alpha, or "
            "use a loss without that term",
        )
    if facts and facts.couples_pairs and loss.use_weighting:
        yield (
            ("loss.use_weighting", "loss"),
            f"requires a separate loss for each pair, but loss {loss.name} couples all pairs of a step; remove "
            "loss.use_weighting",
        )


def _optim_rules(config: Config) -> Iterator[Rule]:
    optim, max_steps = config.optim, config.train.max_steps
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        yield (
            ("optim.warmup_steps", "optim.warmup_ratio"),
            f"cannot be combined with optim.warmup_ratio={optim.warmup_ratio}; keep one of them",
        )
    if optim.gradients == "bf16" and config.model.dtype == "fp32":
        yield (("optim.gradients", "model.dtype"), "requires model.dtype=bf16, but it is fp32; remove optim.gradients")
    if optim.states == "host" and not config.parallel.distributed_optimizer:
        yield (
            ("optim.states", "parallel.distributed_optimizer"),
            "requires parallel.distributed_optimizer=true, but it is false; set it to true, or remove optim.states",
        )
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield (
            ("optim.decay_steps", "optim.schedule"),
            f"applies only to schedule wsd, but optim.schedule is {optim.schedule}; remove optim.decay_steps",
        )
    if optim.min_lr and optim.schedule == "constant":
        yield ("optim.min_lr", "optim.schedule"), "has no effect with the constant schedule; remove optim.min_lr"
    if optim.min_lr > optim.lr:
        yield ("optim.min_lr", "optim.lr"), f"must be at most optim.lr={optim.lr}; lower optim.min_lr"
    if max_steps is not None:
        shaped = (optim.warmup_steps or 0) + (optim.decay_steps or 0)
        if optim.warmup_steps and optim.warmup_steps >= max_steps:
            yield (
                ("optim.warmup_steps", "train.max_steps"),
                f"must be less than train.max_steps={max_steps}, or the run ends during warmup; use fewer warmup steps",
            )
        elif optim.decay_steps and shaped > max_steps:
            yield (
                ("optim.decay_steps", "optim.warmup_steps", "train.max_steps"),
                f"optim.warmup_steps + optim.decay_steps must be at most train.max_steps={max_steps}; lower "
                f"optim.decay_steps to at most {max_steps - (optim.warmup_steps or 0)}",
            )


def _train_rules(config: Config) -> Iterator[Rule]:
    train, data = config.train, config.data
    if train.micro_batch_size is not None and train.micro_batch_size > train.global_batch_size:
        yield (
            ("train.micro_batch_size", "train.global_batch_size"),
            f"must be at most train.global_batch_size={train.global_batch_size}; lower train.micro_batch_size",
        )
    if data.validation is None and not data.validation_fraction:
        held_out = ("data.validation", "data.validation_fraction")
        rule = "requires validation data; set data.validation or data.validation_fraction, or remove this key"
        if train.eval_interval:
            yield ("train.eval_interval", *held_out), rule
        if train.eval_at_start:
            yield ("train.eval_at_start", *held_out), rule
        if train.stop_after_no_gain:
            yield ("train.stop_after_no_gain", *held_out), rule
    elif train.stop_after_no_gain and not train.eval_interval:
        yield (
            ("train.stop_after_no_gain", "train.eval_interval"),
            "requires evaluations before the end of the run, but train.eval_interval is 0; set train.eval_interval, "
            "for example to 0.1epoch",
        )


def _checkpoint_rules(config: Config) -> Iterator[Rule]:
    checkpoint = config.checkpoint
    if checkpoint.accept_changes and not checkpoint.resume:
        yield (
            ("checkpoint.accept_changes", "checkpoint.resume"),
            "applies only to a run that resumes, but checkpoint.resume is false; remove checkpoint.accept_changes",
        )
    if checkpoint.keep_best and config.data.validation is None and not config.data.validation_fraction:
        yield (
            ("checkpoint.keep_best.metric", "data.validation", "data.validation_fraction"),
            "needs held-out pairs; set data.validation or data.validation_fraction, or remove checkpoint.keep_best",
        )
    elif checkpoint.keep_best and not config.train.eval_interval:
        yield (
            ("checkpoint.keep_best.metric", "train.eval_interval"),
            "compares evaluated steps, but with train.eval_interval=0 only the last step is evaluated; set "
            "train.eval_interval, for example to 0.1epoch, or remove checkpoint.keep_best",
        )
    if checkpoint.export == "best" and not checkpoint.keep_best:
        yield (
            ("checkpoint.export", "checkpoint.keep_best"),
            "requires checkpoint.keep_best, but it is null; set checkpoint.keep_best, for example to {metric: "
            "eval/loss}, or set checkpoint.export=true",
        )


def _bad_steps_rules(config: Config) -> Iterator[Rule]:
    window = BadStepsConfig.model_fields["spike_window"].default
    if config.bad_steps.spike_window != window and config.bad_steps.spike_sigma is None:
        yield (
            ("bad_steps.spike_window", "bad_steps.spike_sigma"),
            "has no effect without bad_steps.spike_sigma; set bad_steps.spike_sigma, or remove bad_steps.spike_window",
        )


def _profile_rules(config: Config) -> Iterator[Rule]:
    if profile := config.logging.profile:
        first, last = profile.steps
        if first > last:
            yield ("logging.profile.steps",), "the first step must not be after the last step; swap them"
        elif config.train.max_steps is not None and last > config.train.max_steps:
            yield (
                ("logging.profile.steps", "train.max_steps"),
                f"the last step must be at most train.max_steps={config.train.max_steps}; lower the last step",
            )


def reads_reference(config: Config) -> bool:
    """Whether the run uses a reference: `reference.mode` is not `none`, and the loss needs a reference.

    An invalid loss is assumed to need a reference."""
    facts = facts_of(config.loss)
    return config.reference_mode != "none" and (facts is None or facts.needs_reference)


def facts_of(loss: LossConfig) -> LossFacts | None:
    """Return the LossFacts of a run's loss with its options, or None if the loss name or the options are invalid."""
    if loss.name not in LOSSES or option_problems(loss.name, loss.options, "loss"):
        return None
    return loss_facts(LOSSES[loss.name], with_defaults(LOSSES[loss.name], loss.options))


def with_loss_options(config: Config) -> Config:
    """Return a copy of a valid configuration in which the loss options that are not set have their defaults."""
    loss = config.loss
    values = {**loss.model_dump(exclude=set(loss.options)), **all_options(loss.name, loss.options)}
    return config.model_copy(update={"loss": LossConfig.model_validate(values)})


def loss_problems(config: Config) -> list[str]:
    """List all problems of `loss`: an unknown name, wrong options, and problems that the loss's own check reports."""
    name = config.loss.name
    if name not in LOSSES:
        return [name_problem(LOSSES, name, f"loss.name={show(name)}", plugins=bool(config.plugins))]
    return option_problems(name, config.loss.options, "loss")
