"""Read the results of a run, and record its pairs, in forms that can be compared for equality."""

import json
import os
from pathlib import Path

from dpo_engine.verbs.rehearse import CLOCK

LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "tp2 pp2": (4, {"tp": 2, "pp": 2})}


def trajectory(output: Path) -> list[dict]:
    """Return all lines of a run's metrics, without metrics of time, speed and memory. Floats are hexadecimal text."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v.hex() if isinstance(v, float) else v for k, v in json.loads(line).items() if k not in CLOCK}
        for line in lines
    ]


def steps_of(output: Path) -> list[dict]:
    """Return the unmodified metrics of each optimizer step."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def record_pairs(folder: Path) -> None:
    """From now on, append a record of each step to this rank's file in ``folder``.

    The record lists all pairs of the global batch, in order, and the pairs in this rank's micro-batches.
    """
    from dpo_engine.training import trainer

    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / f"rank_{os.environ['RANK']}.jsonl", "a", encoding="utf-8", buffering=1)
    train_one, train_step = trainer.Trainer.train_one, trainer.train_step
    order: list[str] = []

    def with_order(self, indices):
        order[:] = [str(self.step + 1), *(self.data.train[i].digest for i in indices)]
        return train_one(self, indices)

    def with_pairs(trained, reference, batches, *rest, **options):
        kept = [batch.digest[batch.index >= 0] for batch in batches]
        mine = [half.numpy().tobytes().hex() for batch in kept for half in batch]
        log.write(json.dumps({"step": int(order[0]), "order": order[1:], "mine": mine}) + "\n")
        return train_step(trained, reference, batches, *rest, **options)

    trainer.Trainer.train_one, trainer.train_step = with_order, with_pairs


def recorded_pairs(folder: Path, ranks: int, copies: int) -> dict[int, list[str]]:
    """Map each step to the pairs of its global batch, in order. If a step was repeated, use its last record.

    copies  number of ranks that share one model copy and work on the same pairs

    Asserts that all ranks recorded the same steps and the same order of pairs, and that ``copies`` ranks used each
    pair.
    """
    logs = [(folder / f"rank_{rank}.jsonl").read_text(encoding="utf-8").splitlines() for rank in range(ranks)]
    by_rank = [{line["step"]: line for line in map(json.loads, log)} for log in logs]
    assert all(list(log) == list(by_rank[0]) for log in by_rank)
    for step, line in by_rank[0].items():
        assert all(log[step]["order"] == line["order"] for log in by_rank)
        taken = sorted(digest for log in by_rank for digest in log[step]["mine"])
        assert taken == sorted(line["order"] * copies), f"step {step}: each pair must be used by {copies} ranks"
    return {step: line["order"] for step, line in by_rank[0].items()}
