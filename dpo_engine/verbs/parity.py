"""``dpo-engine parity``: compare a run in its own layout with the same run in a single process.

Both runs score a few pairs from the first global batch with the policy and the reference, take one optimizer step on
these pairs, and score them again. One run uses the configured layout, and the other uses a single process with padded
rows. Equal numbers show that neither the number of ranks nor the tree layout changes the results. Equal numbers in fp64
show that differences in the configured dtype are rounding errors.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.config.sections import BatchConfig, ParallelConfig, ReferenceConfig
from dpo_engine.errors import EngineError
from dpo_engine.platform.launcher import world_from_environment
from dpo_engine.scoring.reference import NoReference
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.evaluate import PAIR_LOGPS, Evaluator
from dpo_engine.training.references import open_reference
from dpo_engine.training.run_data import open_data
from dpo_engine.training.step import train_step
from dpo_engine.verbs import console

PAIRS = 8  # enough for micro-batches of unequal size on several data-parallel ranks, but fast in one process
LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "SLURM_STEP_ID")

# Largest accepted difference, relative to max(1, |value|). Layouts differ in the order of additions. In fp32, an Adam
# step amplifies the resulting differences where gradients are close to zero. In fp64, the differences are much smaller
# than Adam's epsilon. In bf16, every intermediate result has a precision of 8 bits.
TOLERANCE = {
    "float32": {"logps": 1e-5, "loss": 1e-5, "grad_norm": 1e-4, "logps after a step": 1e-4},
    "float64": {"logps": 1e-10, "loss": 1e-10, "grad_norm": 1e-10, "logps after a step": 1e-10},
    "bfloat16": {"logps": 3e-2, "loss": 3e-2, "grad_norm": 5e-2, "logps after a step": 5e-2},
}


def measure(config: Config, *, fp64: bool = False) -> dict[str, Any]:
    """Measure the run in its layout. Call this on every rank.

    fp64   compute in fp64 instead of the run's dtype

    Returns  a dictionary, equal on every rank: ``dtype``, ``batches`` (the batch layout), ``pairs`` (log-probabilities
             of each pair before the step), ``loss``, ``grad_norm``, and ``pairs_after`` (log-probabilities of each pair
             after the step)
    """
    engine = Engine.open(config, fp64=fp64)
    config = engine.config
    try:
        data = open_data(config, engine.groups)
        engine.settle_layout(data.train)
        indices = data.plan.pairs(0)[:PAIRS]
        trained = engine.load_policy(total_steps=1)
        # Skip warmup, because its first step has learning rate 0.
        trained.schedule.num_steps = trained.schedule.lr_warmup_steps
        trained.schedule.step(0)
        reference = open_reference(engine, trained.chunks, pairs=[data.train.subset(indices)])
        batches = engine.batches(data.train, indices)
        known = batch_facts(data.train, indices)
        common = {"known": known, "vocab_size": engine.arch.vocab_size, "groups": engine.groups}
        evaluator = Evaluator(batches, reference, engine.objective, **common)
        evaluator.evaluate(trained.chunks)
        before = _logps(evaluator)
        metrics = train_step(trained, reference, batches, engine.objective, **common)
        evaluator.evaluate(trained.chunks)
        return {
            "dtype": engine.dtype_name,
            "batches": engine.layout,
            "pairs": before,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "pairs_after": _logps(evaluator),
        }
    finally:
        engine.close()


def _logps(evaluator: Evaluator) -> list[dict[str, float]]:
    """Return the log-probabilities from the latest evaluation, one row per pair.

    Without a reference, a row has only the policy's log-probabilities.
    """
    columns = evaluator.per_pair()
    names = ("index", *(PAIR_LOGPS[:2] if isinstance(evaluator.reference, NoReference) else PAIR_LOGPS))
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name].tolist() for name in names), strict=True)]


def differences(one: dict[str, Any], many: dict[str, Any]) -> dict[str, float]:
    """Return the largest difference for each kind of number, relative to ``max(1, |value|)``.

    one    result of :func:`measure` in a single process
    many   result of :func:`measure` in the run's layout
    """

    def relative(a: float, b: float) -> float:
        finite = math.isfinite(a) and math.isfinite(b)
        return abs(a - b) / max(1.0, abs(b)) if finite else math.inf  # max() can ignore a NaN

    def worst(key: str) -> float:
        rows = zip(many[key], one[key], strict=True)
        return max(relative(a[name], b[name]) for a, b in rows for name in b if name != "index")

    return {
        "logps": worst("pairs"),
        "loss": relative(many["loss"], one["loss"]),
        "grad_norm": relative(many["grad_norm"], one["grad_norm"]),
        "logps after a step": worst("pairs_after"),
    }


def parity(config: Config, say: Callable[[str], None] = console.say, *, fp64: bool = False) -> bool:
    """Compare the run's layout with a single process.

    say    called with each line of the report
    fp64   compute in fp64; torch's AdamW then replaces the distributed optimizer, which does not support fp64

    If called in a single process, this starts as many ranks as one model copy needs. Under torchrun or srun, it uses
    the ranks that were started.

    Returns  whether every difference is within its tolerance (always True on ranks other than rank 0)
    """
    rank, world = world_from_environment()
    if config.reference.mode == "stored":
        # Both runs must score with the reference model in their own layout, instead of reading the same stored values.
        config = config.model_copy(update={"reference": ReferenceConfig(mode="offloaded", path=config.reference.path)})
    parallel, alone = config.parallel, ParallelConfig(timeout_s=config.parallel.timeout_s)
    if fp64:
        parallel, alone = (side.model_copy(update={"distributed_optimizer": False}) for side in (parallel, alone))
        config = config.model_copy(update={"parallel": parallel})
    ranks = world if world > 1 else parallel.tp * parallel.pp * parallel.cp
    with tempfile.TemporaryDirectory(prefix="dpo-parity-") as folder:
        if world > 1:
            many = measure(config, fp64=fp64)
            if rank != 0:
                return True
        else:
            many = _measure_in_processes(config, ranks, Path(folder) / "many", fp64=fp64)
        plain = config.model_copy(update={"parallel": alone, "batch": BatchConfig(layout="stacked")})
        one = _measure_in_processes(plain, 1, Path(folder) / "one", fp64=fp64)
    found, allowed = differences(one, many), TOLERANCE[many["dtype"]]
    layout = f"tp {parallel.tp}, pp {parallel.pp}, vpp {parallel.vpp or 1}, cp {parallel.cp} on {_ranks(ranks)}"
    layout += f", {many['batches']} batches"
    computed = many["dtype"] + (", native layers and plain AdamW" if fp64 else "")
    say(f"{len(many['pairs'])} pairs in {computed}: {layout}, compared with one process, stacked batches")
    for name, value in found.items():
        verdict = "equal" if value <= allowed[name] else "DIFFERENT"
        say(f"  {name:<20} {value:.1e}  (allowed {allowed[name]:.0e})  {verdict}")
    return all(value <= allowed[name] for name, value in found.items())


def _measure_in_processes(config: Config, ranks: int, folder: Path, *, fp64: bool) -> dict[str, Any]:
    """Run :func:`measure` in new processes on this machine, so that this process does not occupy device memory."""
    folder.mkdir()
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_KEYS}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore")
    command = [sys.executable, "-m", *launcher, "dpo_engine.verbs.parity", str(folder)]
    command += ["--fp64"] if fp64 else []
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if done.returncode:
        raise _failure(folder, ranks, done.stderr)
    return json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


def _failure(folder: Path, ranks: int, said: str) -> EngineError:
    """Return the error that :func:`main` recorded, with its exit code.

    If no error was recorded, print ``said``, the stderr of the processes, and return a general error.
    """
    if not (folder / "failure.json").exists():
        sys.stderr.write(said)
        return EngineError(f"parity: the run with {_ranks(ranks)} failed; read its output above")
    failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
    error = EngineError(failure["problems"])
    error.exit_code = failure["exit_code"]
    return error


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def main(folder: str, *options: str) -> None:
    """Measure the run in ``folder`` and write the results there. Run by :func:`_measure_in_processes`."""
    config = Config.load(Path(folder) / "run.yaml")
    first = world_from_environment()[0] == 0
    try:
        numbers = measure(config, fp64="--fp64" in options)
    except EngineError as error:
        if first:
            failure = {"problems": list(error.problems), "exit_code": error.exit_code}
            (Path(folder) / "failure.json").write_text(json.dumps(failure), encoding="utf-8")
        sys.exit(error.exit_code)
    if first:
        (Path(folder) / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
