"""Check the first step of a run, for which the correct loss and reward margin are usually known."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.errors import NumbersError
from dpo_engine.optim.optimizer import Trained
from dpo_engine.training.engine import Engine

SAME_PASS = 1e-4
"""Tolerance, relative to ``max(1, |value|)``, if policy and reference run the same code on the same rows."""

EARLIER_PASS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Tolerance if the reference scored the pairs earlier, perhaps in another layout, or if ``tp_comm_overlap`` is on."""

CAUSES = {
    "resident": "dropout in the model, different weights in policy and reference, a nondeterministic kernel",
    "shared": "dropout in the model, adapters that were not turned off or exchanged, a nondeterministic kernel",
    "offloaded": "dropout in the model, weights lost while swapping, a nondeterministic kernel",
    "stored": "a stale store, dropout in the model, a nondeterministic kernel",
    "dataset": "records scored with other weights, records scored with another chat template or truncation, "
    "dropout in the model",
}
"""Likely causes of a wrong first step, by ``reference.mode``."""
ROUTING = "routers that chose other experts in bf16, because the reference scored the pairs in another layout"
"""A further cause for models with experts, if the reference scored the pairs earlier."""
ROUNDING = "numbers that were rounded to other FP8 values, because the reference scored the pairs in another layout"
"""A further cause with FP8, if the reference scored the pairs earlier."""
PIECES = "matrix products that tp_comm_overlap cuts into pieces, but only in the policy's forward pass"
"""A further cause with ``tp_comm_overlap``; see :mod:`~dpo_engine.model.tp_overlap`."""


def known_equal(engine: Engine) -> bool:
    """Whether the policy and the reference are known to have equal weights at the first step."""
    config = engine.config
    # Without verification, it is unknown which model scored the data set.
    trusted = config.reference_mode == "dataset" and not config.reference.verify
    return engine.objective.facts.needs_reference and engine.same_weights and not trusted


def tolerance(engine: Engine) -> float:
    """Return the tolerance for values that must be equal because policy and reference are equal."""
    now = engine.config.reference_mode in ("resident", "shared", "offloaded")
    return SAME_PASS if now and not engine.config.megatron.tp_comm_overlap else EARLIER_PASS[engine.dtype]


def require_first_step(engine: Engine, trained: Trained, metrics: dict[str, float]) -> None:
    """Check the first step's loss, margin, and gradients.

    *Collectives*: those of :func:`dead_stages`.
    Raises :class:`~dpo_engine.errors.NumbersError`, which names the likely causes, if a check fails.
    """
    if problems := first_step_problems(engine, metrics) + dead_stages(engine, trained):
        raise NumbersError(problems)


def first_step_problems(engine: Engine, metrics: dict[str, float]) -> list[str]:
    """Return a line for each problem with the metrics of a run's first step.

    If the policy and the reference are equal, the mean reward margin must be 0. If the loss function declares an
    initial value, the loss must then also have this value.
    """
    facts, config = engine.objective.facts, engine.config
    if not known_equal(engine):
        return []
    allowed = tolerance(engine)
    equal = (
        f"the policy and the reference are equal, so {{}} must be {{:.7f}}; likely causes: "
        f"{CAUSES[config.reference_mode]}"
    )
    if engine.dtype is torch.bfloat16 and config.reference_mode in ("stored", "dataset"):
        equal += f", {ROUTING}" if engine.arch.experts else ""
        equal += f", {ROUNDING}" if config.megatron.fp8_recipe else ""
    equal += f", {PIECES}" if config.megatron.tp_comm_overlap else ""
    expected = {"loss": facts.at_init, "rewards/margins": 0.0}
    return [
        f"first {name}={metrics[name]:.7f}: " + equal.format("it", value)
        for name, value in expected.items()
        if value is not None and not abs(metrics[name] - value) <= allowed * max(1.0, abs(value))
    ]


def dead_stages(engine: Engine, trained: Trained) -> list[str]:
    """Return a line for each pipeline stage whose gradients are all zero after the first step.

    A stage whose weights are all frozen has no gradients, and is not reported.

    If the policy and the reference are not known to be equal, zero gradients on all stages are not reported, because
    the loss may be constant at this point. For example, a hinge loss is constant beyond its margin.

    *Collectives*: one all-gather of objects over all ranks.
    """
    groups = engine.groups
    trainable = [p for chunk in trained.chunks for p in chunk.parameters() if p.requires_grad]
    sizes = [torch.linalg.vector_norm(_gradient(p), math.inf).double() for p in trainable]  # abs() would make copies
    largest = float(torch.stack(sizes).max()) if sizes else None  # the host waits for the device only once
    everyone: list[tuple[int, float | None] | None] = [None] * groups.world.size()
    dist.all_gather_object(everyone, (groups.pp.rank(), largest), group=groups.world)
    alive = {stage for stage, value in filter(None, everyone) if value is not None and value > 0}
    frozen = {stage for stage, value in filter(None, everyone) if value is None}
    if not alive and not known_equal(engine):
        return []
    return [
        f"first step: every gradient of pipeline stage {stage} is zero; likely causes: disconnected weights, "
        "a constant loss, pairs whose two responses score the same"
        for stage in range(groups.pp.size())
        if stage not in alive | frozen
    ]


def _gradient(parameter: Tensor) -> Tensor:
    gradient = getattr(parameter, "main_grad", None)
    return parameter.new_zeros(1) if gradient is None else gradient
