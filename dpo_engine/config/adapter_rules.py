"""Rules on the section `adapter` and other keys: find combinations that are not supported or have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_engine.config.run import Config

Rule = tuple[tuple[str, ...], str]


def adapter_rules(config: Config) -> Iterator[Rule]:
    """For each broken rule, yield the keys that the rule reads, and text that says what is wrong with the first key."""
    adapter, reference = config.adapter, config.reference
    if adapter is None:
        if reference.mode == "shared":
            yield (
                ("reference.mode", "adapter"),
                "requires an adapter, because the reference is the policy's model without its trained adapter; set "
                "adapter, or reference.mode=resident",
            )
        if reference.adapter != "start":
            yield ("reference.adapter", "adapter"), "applies only with adapter.path; remove reference.adapter"
        return
    if reference.adapter != "start" and adapter.path is None:
        yield ("reference.adapter", "adapter.path"), "applies only with adapter.path; remove reference.adapter"
    if reference.adapter != "start" and reference.path is not None:
        yield (
            ("reference.adapter", "reference.path"),
            "has no effect with reference.path, whose model is used without an adapter; remove reference.adapter",
        )
    if reference.mode == "offloaded" and reference.path is None:
        yield (
            ("reference.mode", "reference.path", "adapter"),
            "is not supported with an adapter, because the policy and the reference then share the base weights; set "
            "reference.mode=shared, which needs no extra memory",
        )
    elif reference.mode == "offloaded":
        yield (
            ("reference.mode", "reference.path", "adapter"),
            "is not supported with an adapter; set reference.mode=resident or stored",
        )
    elif config.reference_mode == "shared":
        yield from _shared_rules(config)
    elif reference.sync_every:
        yield (
            ("reference.sync_every", "reference.mode", "adapter"),
            f"with an adapter, reference.mode must be shared, but it is {reference.mode}; set reference.mode=shared",
        )
    if config.optim.freeze:
        yield (
            ("optim.freeze", "adapter"),
            "has no effect with an adapter, because only the adapter is trained; remove optim.freeze",
        )
    if config.train.freeze_router:
        yield (
            ("train.freeze_router", "adapter"),
            "has no effect with an adapter, because only the adapter is trained; remove train.freeze_router",
        )
    if config.optim.gradients == "bf16":
        yield (
            ("optim.gradients", "adapter"),
            "has no effect with an adapter, whose parameters and gradients are fp32; remove optim.gradients",
        )


def _shared_rules(config: Config) -> Iterator[Rule]:
    reference = config.reference
    if reference.path is not None:
        yield (
            ("reference.path", "reference.mode", "adapter"),
            "requires a second model, but reference.mode is shared; set reference.mode to resident, stored or dataset",
        )
    if reference.sync_every and reference.sync_alpha != 1:
        yield (
            ("reference.sync_alpha", "reference.sync_every", "adapter"),
            "must be 1 with an adapter, because averaging the matrices A and B of two adapters does not average the "
            "two models; set reference.sync_alpha=1",
        )
    if reference.sync_every and reference.adapter == "none" and config.adapter.path is not None:
        yield (
            ("reference.adapter", "reference.sync_every"),
            "cannot be combined with reference.sync_every; remove one of them",
        )
