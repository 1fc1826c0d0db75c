"""Train a tiny model for a few steps in any layout and return the results, to compare layouts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_engine.testing.pairs import RandomPairs, global_batches

VOCAB = 515


def run_config(start: Path | str, output: Path | str, /, **sections: dict[str, Any]):
    """Return a :class:`Config` for a run on random pairs; ``sections`` are merged into the defaults below."""
    from dpo_engine.config.run import Config

    raw: dict[str, Any] = {
        "model": {"path": str(start)},
        "data": {"train": "unused.jsonl"},
        # Adam divides rounding errors in tiny gradients by tiny numbers. A larger eps keeps the quotients small.
        "optim": {"lr": 3e-4, "schedule": "constant", "weight_decay": 0.01, "clip_grad": 1.0, "eps": 1e-6},
        "train": {"output_dir": str(output), "micro_batch_size": 2},
        "batch": {"layout": "stacked"},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return Config.parse(raw)


def load_weights(directory: Path | str) -> dict[str, Any]:
    """Load all tensors of a Hugging Face checkpoint, which may have several files."""
    from safetensors.torch import load_file

    return {name: value for path in Path(directory).glob("*.safetensors") for name, value in load_file(path).items()}


def train_steps(
    config: Any,
    sizes: Sequence[int],
    export: str | None = None,
    weighted: bool = True,
    judged: bool = False,
    few: int | None = None,
    fp64: bool = False,
    masked: bool = False,
) -> dict[str, Any]:
    """Train on every rank, with one optimizer step per global batch.

    sizes    numbers of pairs in the global batches
    export   directory to which the weights are exported; None: no export. If adapters are trained, only a PEFT adapter
             is exported, to a directory beside ``export``
    fp64     whether to compute in fp64
    weighted, judged, few, masked   as for :class:`~dpo_engine.testing.pairs.RandomPairs`

    Returns  a dictionary: ``steps`` (the metrics of every step), ``eval`` (the metrics of an evaluation of 5 other
             pairs), and ``per_pair`` (the columns of this evaluation, with one value per pair)
    """
    import numpy as np
    import torch

    from dpo_engine.model.weights.save import save_hf
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.evaluate import Evaluator
    from dpo_engine.training.exporting import merge_of, save_adapter
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config, fp64=fp64)
    pairs = RandomPairs(sum(sizes), VOCAB, weighted=weighted, judged=judged, few=few, masked=masked)
    trained = engine.load_policy(total_steps=len(sizes))
    reference = open_reference(engine, trained.chunks, pairs=[pairs])
    held_out = RandomPairs(5, VOCAB, seed=9, judged=judged, few=few, masked=masked)
    evaluator = Evaluator(
        engine.batches(held_out, np.arange(5)),
        reference,
        engine.objective,
        known=batch_facts(held_out, np.arange(5)),
        vocab_size=engine.arch.vocab_size,
        groups=engine.groups,
    )
    steps = [
        train_step(
            trained,
            reference,
            engine.batches(pairs, indices),
            engine.objective,
            known=batch_facts(pairs, indices),
            vocab_size=engine.arch.vocab_size,
            groups=engine.groups,
            count_zeros=config.logging.num_zeros,
        )
        for indices in global_batches(sizes)
    ]
    evaluation = evaluator.evaluate(trained.chunks)
    chunks = [chunk.module for chunk in trained.chunks]
    if export and engine.adaptation:
        save_adapter(engine, merge_of(engine, chunks), export)
    elif export:
        dtype = torch.float64 if fp64 else None
        save_hf(chunks, engine.arch, export, source=config.model.path, groups=engine.groups, dtype=dtype)
    per_pair = {name: column.tolist() for name, column in evaluator.per_pair().items()}
    engine.close()
    return {"steps": steps, "eval": evaluation, "per_pair": per_pair}
