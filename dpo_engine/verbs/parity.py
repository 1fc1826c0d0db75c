"""``dpo-engine parity``: the user's own run in its layout and in one process, number against number.

A few pairs of the run's first global batch are scored by policy and reference, one optimiser step is made on them, and
they are scored again; once in the asked layout, once alone in padded rows. Equal numbers mean that neither ranks nor
rows of trees change anything; in fp64, that what differs in the run's own dtype is its rounding.
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
from dpo_engine.platform.parallel import world_from_environment
from dpo_engine.scoring.reference import NoReference
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.evaluate import PAIR_LOGPS, Evaluator
from dpo_engine.training.references import open_reference
from dpo_engine.training.run_data import open_data
from dpo_engine.training.step import train_step
from dpo_engine.verbs import console

PAIRS = 8  # enough for ragged micro-batches and several data-parallel ranks, few enough for one process
LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "SLURM_STEP_ID")

# Largest accepted difference relative to max(1, |value|). In fp32 layouts differ by the order of additions; a step
# through Adam magnifies that where gradients nearly vanish. In fp64 rounding is far below Adam's own epsilon. In bf16
# every intermediate has 8 bits.
TOLERANCE = {
    "float32": {"logps": 1e-5, "loss": 1e-5, "grad_norm": 1e-4, "logps after a step": 1e-4},
    "float64": {"logps": 1e-10, "loss": 1e-10, "grad_norm": 1e-10, "logps after a step": 1e-10},
    "bfloat16": {"logps": 3e-2, "loss": 3e-2, "grad_norm": 5e-2, "logps after a step": 5e-2},
}


def measure(config: Config, *, fp64: bool = False) -> dict[str, Any]:
    """The numbers of this run's layout, in its dtype or in fp64; called on every rank of it.

    Returns  ``dtype``, ``batches`` (their layout), ``pairs`` (per-pair log-probabilities before the step), ``loss``,
             ``grad_norm`` and ``pairs_after``, equal on every rank
    """
    engine = Engine.open(config, fp64=fp64)
    try:
        data = open_data(config, engine.groups)
        engine.settle_layout(data.train)
        indices = data.plan.pairs(0)[:PAIRS]
        trained = engine.load_policy(total_steps=1)
        trained.schedule.num_steps = trained.schedule.lr_warmup_steps  # step 0 of a warm-up would change nothing
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
    """Log-probabilities of the latest evaluation, a row for each pair; without a reference, the policy's alone."""
    columns = evaluator.per_pair()
    names = ("index", *(PAIR_LOGPS[:2] if isinstance(evaluator.reference, NoReference) else PAIR_LOGPS))
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name].tolist() for name in names), strict=True)]


def differences(one: dict[str, Any], many: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each kind of number, relative to ``max(1, |value|)``."""

    def relative(a: float, b: float) -> float:
        finite = math.isfinite(a) and math.isfinite(b)
        return abs(a - b) / max(1.0, abs(b)) if finite else math.inf  # max() would pass over a nan

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
    """Compare the run's layout with one process; ``say`` gets the lines of the report.

    fp64   compute in fp64, with torch's Adam on every rank in place of the distributed optimizer, which knows no fp64

    Started alone, this starts the ranks of one model copy itself; under torchrun or srun it uses the ranks it finds.

    Returns  whether every difference is within its tolerance (on ranks other than the first: True)
    """
    rank, world = world_from_environment()
    if config.reference.mode == "stored":
        # Rows that one side has stored would hide from the other what its own layout makes of them.
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
    layout = f"tp {parallel.tp}, pp {parallel.pp}, vpp {parallel.vpp or 1}, cp {parallel.cp} on {ranks} ranks"
    layout += f", batches {many['batches']}"
    computed = many["dtype"] + (", native layers and plain AdamW" if fp64 else "")
    say(f"{len(many['pairs'])} pairs in {computed}: {layout}, against one process, stacked")
    for name, value in found.items():
        verdict = "equal" if value <= allowed[name] else "DIFFERENT"
        say(f"  {name:<20} {value:.1e}  (allowed {allowed[name]:.0e})  {verdict}")
    return all(value <= allowed[name] for name, value in found.items())


def _measure_in_processes(config: Config, ranks: int, folder: Path, *, fp64: bool) -> dict[str, Any]:
    """:func:`measure` in fresh processes of this machine, which keep no memory of the device here."""
    folder.mkdir()
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_KEYS}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore")
    command = [sys.executable, "-m", *launcher, "dpo_engine.verbs.parity", str(folder)]
    command += ["--fp64"] if fp64 else []
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise _failure(folder, ranks, done.stderr)
    return json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


def _failure(folder: Path, ranks: int, said: str) -> EngineError:
    """Why :func:`main` did not finish, with the exit code that belongs to it; ``said`` is shown otherwise."""
    if not (folder / "failure.json").exists():
        sys.stderr.write(said)
        return EngineError(f"the run did not finish on {ranks} rank(s); its own message is above")
    failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
    error = EngineError(failure["problems"])
    error.exit_code = failure["exit_code"]
    return error


def main(folder: str, *options: str) -> None:
    """One rank of :func:`_measure_in_processes`: measure the run in ``folder`` and leave the numbers there."""
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
