"""Run the engine once in its own process and print its measurements: `python run_engine.py JOB.json`."""

import hashlib
import sys
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch
import yaml
from flops import executed_flops
from measure import Job, Measured, Meter, said

from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.references import open_reference
from dpo_engine.training.step import train_step


def configured(job: Job) -> Config:
    """Return the config of the run: the settings that the engine and TRL have in common, then the job's overrides."""
    path = f"{job.scratch}/run.yaml"
    raw = {
        "model": {"path": job.model, "dtype": job.dtype},
        "data": {"train": job.pairs},
        "optim": {"lr": job.lr, "schedule": "constant", "clip_grad": 1.0, "weight_decay": 0.0},
        "train": {"output_dir": job.scratch, "global_batch_size": len(job.steps[0])},
    }
    if job.adapter:
        raw["adapter"] = {"path": job.adapter}
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(raw, file)
    return Config.load(path, job.overrides)


def run(job: Job, meter: Meter) -> Measured:
    """Train on the job's pairs. The time to fill a store is measured; the time to load models is not."""
    config = configured(job)
    engine, pairs, measured = Engine.open(config), PairDataset(job.pairs, sources=["pairs"]), Measured()
    engine.settle_batches(pairs)
    trained = engine.load_policy(total_steps=len(job.steps))
    meter.start()
    reference = open_reference(engine, trained.chunks, pairs=[pairs])
    if config.reference.mode == "stored":
        measured.filling_s = meter.lap()
    meter.start()
    for indices in map(np.array, job.steps):
        batches = engine.batches(pairs, indices)
        metrics = train_step(
            trained,
            reference,
            batches,
            engine.objective,
            known=batch_facts(pairs, indices),
            vocab_size=engine.arch.vocab_size,
            groups=engine.groups,
        )
        measured.steps_s.append(meter.lap())
        measured.metrics.append(said(metrics))
        measured.largest_tokens = max(measured.largest_tokens, *(batch.tokens.numel() for batch in batches))
    meter.memory(measured)
    if job.digest:
        measured.digest = digest(trained.chunks)
    engine.close()
    return measured


def digest(chunks: Iterable[torch.nn.Module]) -> str:
    """Return the SHA-256 of all weights, chunk by chunk, in the order of their names in the chunk."""
    found = hashlib.sha256()
    for chunk in chunks:
        for _, weight in sorted(chunk.named_parameters()):
            found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def main() -> None:
    job, meter = Job.read(sys.argv[1]), Meter()
    with executed_flops() if job.count else nullcontext() as counter:
        measured = run(job, meter)
    measured.flops = float(counter.get_total_flops()) if counter else 0.0
    measured.report()


if __name__ == "__main__":
    main()
