"""Run the first steps of a run, and record the numbers that must be equal in every layout.

Equal weights hide bugs. If the policy equals the reference, every margin is 0. All pairs then have the same loss, even
if a loss wrongly reads other pairs of the micro-batch. Scoring with the wrong one of the two models also changes
nothing. Therefore the policy's weights are changed first, in a way that does not depend on the layout
(:func:`~dpo_engine.model.weights.perturb.perturb`). Training steps would also separate the two models, but more slowly
(at a learning rate of 1e-6, margins stay near 0 for many steps), and with the very code that is under test. The
reference's log-probabilities are recorded *before* the change, and again after the steps. If a reference wrongly reads
the policy's weights, the two records differ.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpo_engine.batching.batches import Batch
from dpo_engine.config.run import Config
from dpo_engine.model.policy import await_weights
from dpo_engine.model.weights.adapter_weights import draw_adapters
from dpo_engine.model.weights.perturb import perturb
from dpo_engine.scoring.reference import NoReference, Reference
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.evaluate import PAIR_LOGPS, Evaluator
from dpo_engine.training.objective import BatchFacts
from dpo_engine.training.references import open_reference
from dpo_engine.training.run_data import RunData, open_data
from dpo_engine.training.step import train_step

STEPS = 3  # the second step shows a wrong first update, and the third step a wrong optimizer state
PAIRS = 8  # enough for micro-batches of unequal size on several data-parallel ranks, but fast in one process
AMOUNT = 0.05  # more than a rounding error in bf16, but too little to saturate a sigmoid
TIE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.0}  # in bf16, accuracies are not compared


def measure(config: Config, *, fp64: bool = False) -> dict[str, Any]:
    """Take the first steps of the run, at most `STEPS`, in the run's layout. Call this on every rank.

    fp64   whether to compute in fp64 instead of the run's dtype

    Each step uses the first `PAIRS` pairs of the global batch that the run uses in this step. The learning rate has no
    warmup, because a learning rate of 0 would hide errors. The reference is not updated (``reference.sync_every`` has
    no effect).

    Returns  a dictionary, equal on every rank:
             ``dtype``, ``layout`` (of batches), ``largest`` (number of pairs in the largest micro-batch);
             ``before``: one row per pair, with its log-probabilities under the reference and the unchanged policy, and
             its loss;
             ``steps``: for each step, ``pairs`` (rows of the step's pairs, scored before the step) and ``metrics``;
             ``after``: rows of all pairs after the last step
    """
    engine = Engine.open(_without_warmup(config), fp64=fp64)
    try:
        data = open_data(engine.config, engine.groups)
        engine.settle_batches(data.train)
        steps = [data.plan.pairs(step)[:PAIRS] for step in range(min(STEPS, data.plan.num_steps))]
        return _measure(engine, data, steps)
    finally:
        engine.close()


def _without_warmup(config: Config) -> Config:
    optim = config.optim.model_copy(update={"warmup_steps": None, "warmup_ratio": None})
    return config.model_copy(update={"optim": optim})


def _measure(engine: Engine, data: RunData, steps: list[np.ndarray]) -> dict[str, Any]:
    batches = [engine.batches(data.train, indices) for indices in steps]
    known = [_facts(engine, data, indices) for indices in steps]
    everything = np.unique(np.concatenate(steps))
    trained = engine.load_policy(total_steps=data.plan.num_steps)
    # An offloaded reference scores several steps ahead, as in a run.
    reference = open_reference(
        engine, trained.chunks, pairs=[data.train.subset(everything)], upcoming=lambda: iter(batches)
    )

    def rows(scored: list[Batch], facts: BatchFacts) -> list[dict[str, float]]:
        evaluator = Evaluator(scored, reference, engine.objective, known=facts, **model)
        evaluator.evaluate(trained.chunks, tie=facts.tie)
        return _rows(evaluator, reference)

    model = {"vocab_size": engine.arch.vocab_size, "groups": engine.groups}
    every, facts = engine.batches(data.train, everything), _facts(engine, data, everything)
    found: dict[str, Any] = {"dtype": engine.dtype_name, "layout": engine.layout, "largest": _largest(engine, batches)}
    found |= {"before": rows(every, facts), "steps": []}
    await_weights(trained.chunks)
    plain = [chunk.module for chunk in trained.chunks]
    if engine.adaptation:  # a new adapter's B is zero, which hides every error in A
        given = {"groups": engine.groups, "seed": engine.config.train.seed + 1, "scale": AMOUNT}
        draw_adapters(plain, engine.adaptation, engine.arch, **given)
    else:
        perturb(plain, engine.arch, groups=engine.groups, amount=AMOUNT)
    trained.optimizer.reload_model_params()
    for scored, own in zip(batches, known, strict=True):
        pairs = rows(scored, own)
        metrics = train_step(trained, reference, scored, engine.objective, known=own, **model)
        found["steps"].append({"pairs": pairs, "metrics": metrics})
    return found | {"after": rows(every, facts)}


def _facts(engine: Engine, data: RunData, indices: np.ndarray) -> BatchFacts:
    """Return the facts of a batch.

    In the accuracies of rewards and in ``displacement/chosen_fell``, relative differences up to `TIE` count as ties.
    Otherwise, rounding could change these metrics.
    """
    return batch_facts(data.train, indices)._replace(tie=TIE[engine.dtype])


def _largest(engine: Engine, steps: list[list[Batch]]) -> int:
    """Return the number of pairs in the largest micro-batch on any rank. *Collectives*: one MAX over world."""
    sizes = [int((batch.index >= 0).sum()) for batches in steps for batch in batches]
    largest = torch.tensor(max(sizes), device=engine.platform.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=engine.groups.world)
    return int(largest)


def _rows(evaluator: Evaluator, reference: Reference) -> list[dict[str, float]]:
    """Return the log-probabilities and losses from the latest evaluation, one row per pair.

    Without a reference, a row has no log-probabilities of the reference.
    """
    columns = evaluator.per_pair()
    names = ("index", "loss", *(PAIR_LOGPS[:2] if isinstance(reference, NoReference) else PAIR_LOGPS))
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name].tolist() for name in names), strict=True)]
