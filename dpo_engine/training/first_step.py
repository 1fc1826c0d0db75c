"""What must hold of the first step of any run, checked on the run itself."""

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.optim.optimizer import Trained
from dpo_engine.training.engine import Engine

SAME_PASS = 1e-4
"""Largest difference, relative to ``max(1, |value|)``, where policy and reference run the same code on equal rows."""

EARLIER_PASS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""The same where the reference was scored before, perhaps in another layout."""

CAUSES = {
    "resident": "dropout in the model, weights that differ between the two, a kernel that is not deterministic",
    "offloaded": "dropout in the model, a swap that lost weights, a kernel that is not deterministic",
    "stored": "a stale store, dropout in the model, a kernel that is not deterministic",
    "dataset": "columns scored with other weights, another chat template or another truncation, dropout in the model",
}


def known_equal(engine: Engine) -> bool:
    """Whether policy and reference are known to be equal at the first step."""
    asked = engine.config.reference
    trusted = asked.mode == "dataset" and not asked.verify  # nobody said whose log-probabilities they are
    return engine.objective.facts.needs_reference and engine.same_weights and not trusted


def first_step_problems(engine: Engine, metrics: dict[str, float]) -> list[str]:
    """What is wrong with the metrics of a first step: while policy and reference are equal, the loss has the value it
    declares and the rewards have no margin."""
    facts, config = engine.objective.facts, engine.config
    if not known_equal(engine):
        return []
    now = config.reference.mode in ("resident", "offloaded")
    allowed = SAME_PASS if now else EARLIER_PASS[engine.dtype]
    equal = f"policy and reference are equal, so {{}} must be {{:.7f}}; likely causes: {CAUSES[config.reference.mode]}"
    expected = {"loss": facts.at_init, "rewards/margins": 0.0}
    return [
        f"first {name}={metrics[name]:.7f}: " + equal.format("it", value)
        for name, value in expected.items()
        if value is not None and not abs(metrics[name] - value) <= allowed * max(1.0, abs(value))
    ]


def dead_stages(engine: Engine, trained: Trained) -> list[str]:
    """A line for each pipeline stage whose gradients are all zero, from the buffers that a step has left.

    All of them may be zero where the policy already keeps the margin that a loss asks for, as a hinge does.

    *Collectives*: one gather of objects over all ranks.
    """
    groups = engine.groups
    largest = max(
        (float(_gradient(p).abs().max()) for chunk in trained.chunks for p in chunk.parameters()), default=0.0
    )
    everyone: list[tuple[int, float] | None] = [None] * groups.world.size()
    dist.all_gather_object(everyone, (groups.pp.rank(), largest), group=groups.world)
    alive = {stage for stage, value in filter(None, everyone) if value > 0}
    if not alive and not known_equal(engine):
        return []
    return [
        f"first step: every gradient of pipeline stage {stage} is zero; likely causes: frozen or disconnected weights, "
        "a loss that is constant, pairs whose two responses score alike"
        for stage in range(groups.pp.size())
        if stage not in alive
    ]


def _gradient(parameter: Tensor) -> Tensor:
    gradient = getattr(parameter, "main_grad", None)
    return parameter.new_zeros(1) if gradient is None else gradient
