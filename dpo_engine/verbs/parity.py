"""``dpo-engine parity``: compare a run in its own layout with the same run in a single process.

Both runs take a few optimizer steps on pairs of the first global batches (:mod:`~dpo_engine.training.short_run`). They
record the loss, the gradient norm and all metrics of each step. They also record the log-probabilities of each pair
before each step and after the last step. One run uses the configured layout. The other run uses a single process,
padded rows, and micro-batches of a different size. If both runs record equal numbers, the layout, the padding and the
size of micro-batches do not affect the results. If the numbers differ in the configured dtype but are equal in fp64,
the differences are rounding errors.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_engine.config.run import Config
from dpo_engine.config.sections import BatchConfig, MegatronConfig, ParallelConfig, ReferenceConfig
from dpo_engine.errors import EngineError
from dpo_engine.model.cuda_graphs import without_graphs
from dpo_engine.model.fp8 import without_fp8
from dpo_engine.model.megatron_options import WITH_SHARDS
from dpo_engine.model.tp_overlap import without_overlap
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.launcher import world_from_environment
from dpo_engine.training.short_run import measure
from dpo_engine.verbs import console

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "SLURM_STEP_ID")

LOGPS, LOSS, NORM, METRICS = "log-probabilities", "loss", "gradient norm", "other metrics"
STEP_KINDS = (LOGPS, LOSS, NORM, METRICS)
REFERENCE, AFTER = "reference after all steps", "policy after all steps"

FIRST = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 3e-2}
"""Largest accepted difference before the first update, relative to ``max(1, |value|)``. Layouts differ in the order of
additions. In bf16, every intermediate result has a precision of 8 bits."""

LATER = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 5e-2}
"""Largest accepted difference after an update. If the gradient of a weight is close to zero, the gradient's rounding
error is relatively large, and an Adam step changes the weight by up to the learning rate in either direction. In fp64,
rounding errors are much smaller than Adam's epsilon. The gradient norm has this tolerance in the first step, too,
because a backward pass adds up more rounding errors than a forward pass."""

JUMPS = ("accuracies", "accuracies_per_token", "chosen_fell", "load")
"""Metrics that jump if a rounding error changes a sign or the choice of an expert.

Each item is the last component of the names of such metrics. The metrics are not compared in bf16."""


class Difference(NamedTuple):
    """The largest difference of one kind of number at one step.

    where    name of the number, such as ``rewards/margins``
    found    the difference, relative to ``max(1, |value|)``
    allowed  the largest accepted difference
    """

    where: str
    found: float
    allowed: float

    @property
    def equal(self) -> bool:
        return self.found <= self.allowed


def differences(one: dict[str, Any], many: dict[str, Any]) -> dict[str, list[Difference]]:
    """Return the largest difference for each kind of number, at each step and after all steps.

    one    result of :func:`~dpo_engine.training.short_run.measure` in a single process
    many   result of :func:`~dpo_engine.training.short_run.measure` in the run's layout
    """
    dtype = many["dtype"]
    found: dict[str, list[Difference]] = {kind: [] for kind in STEP_KINDS}
    for step, (a, b) in enumerate(zip(many["steps"], one["steps"], strict=True)):
        allowed = (LATER if step else FIRST)[dtype]
        names = [name for name in b["pairs"][0] if name not in ("index", "loss")]
        found[LOGPS].append(_worst_row(a["pairs"], b["pairs"], allowed, names))
        means = [("mean loss", a["metrics"]["loss"], b["metrics"]["loss"])]
        pairs = [("loss of a pair", x["loss"], y["loss"]) for x, y in zip(a["pairs"], b["pairs"], strict=True)]
        found[LOSS].append(_worst(means + pairs, allowed))
        norms = a["metrics"]["grad_norm"], b["metrics"]["grad_norm"]
        found[NORM].append(_worst([("grad_norm", *norms)], LATER[dtype]))
        if a["metrics"].keys() != b["metrics"].keys():
            absent = min(a["metrics"].keys() ^ b["metrics"].keys())
            found[METRICS].append(Difference(absent, math.inf, allowed))
            continue
        rest = [name for name in b["metrics"] if name not in ("loss", "grad_norm")]
        rest = [name for name in rest if dtype != "bfloat16" or name.rpartition("/")[2] not in JUMPS]
        found[METRICS].append(_worst([(name, a["metrics"][name], b["metrics"][name]) for name in rest], allowed))
    # The reference must not change in any step. Therefore its numbers in the layout after all steps are compared with
    # its numbers in the single process before step 1.
    reference = [name for name in one["before"][0] if name.startswith("ref_")]
    if reference:
        found[REFERENCE] = [_worst_row(many["after"], one["before"], FIRST[dtype], reference)]
    policy = [name for name in one["after"][0] if name not in ("index", "loss", *reference)]
    return found | {AFTER: [_worst_row(many["after"], one["after"], LATER[dtype], policy)]}


def _worst_row(
    many: Sequence[dict[str, float]], one: Sequence[dict[str, float]], allowed: float, names: Sequence[str]
) -> Difference:
    return _worst([(name, a[name], b[name]) for a, b in zip(many, one, strict=True) for name in names], allowed)


def _worst(numbers: Sequence[tuple[str, float, float]], allowed: float) -> Difference:
    def relative(a: float, b: float) -> float:
        finite = math.isfinite(a) and math.isfinite(b)
        return abs(a - b) / max(1.0, abs(b)) if finite else math.inf  # max() can ignore a NaN

    found, where = max((relative(a, b), name) for name, a, b in numbers)
    return Difference(where, found, allowed)


def table(found: dict[str, list[Difference]]) -> list[str]:
    """Return the lines of a table: the largest difference of each kind at each step, and the verdict."""
    steps = len(found[LOSS])
    lines = [f"{'':<26}" + "".join(f"{f'step {step + 1}':>9}" for step in range(steps)) + "   allowed"]
    for kind, row in found.items():
        values = [f"{one.found:.1e}" for one in row]
        cells = "".join(f"{value:>9}" for value in [*[""] * (steps - len(row)), *values])
        limits = dict.fromkeys(f"{one.allowed:.0e}" for one in row)
        verdict = "equal"
        if wrong := [step for step, one in enumerate(row) if not one.equal]:
            worst = max((row[step] for step in wrong), key=lambda one: one.found / one.allowed)
            place = f" from step {wrong[0] + 1}" if kind in STEP_KINDS else ""
            verdict = f"DIFFERENT{place}: {worst.where}"
        lines.append(f"{kind:<26}{cells}   {', then '.join(limits):<17}  {verdict}")
    return lines


def parity(config: Config, say: Callable[[str], None] = console.say, *, fp64: bool = False) -> bool:
    """Compare the run's layout with a single process.

    say    called with each line of the report
    fp64   compute in fp64; torch's AdamW then replaces the distributed optimizer, which does not support fp64

    If called in a single process, this function starts as many ranks as one copy of the model needs. Under torchrun or
    srun, it uses the ranks that were started.

    FP8 is turned off, because its rounding errors are larger than those of bf16, for which the tolerances are chosen.
    The differences between layouts in FP8 have not been measured on a GPU. With ``fp64``, settings whose kernels do not
    support fp64 are changed, too: ``tp_comm_overlap`` is turned off, and ``model.attention: te`` and
    ``model.flash_attention`` are replaced by the defaults of these keys.

    Returns  whether every difference is within its tolerance (always True on ranks other than rank 0)
    """
    rank, world = world_from_environment()
    if config.reference_mode == "stored":
        # Both runs must score with the reference model in their own layout, instead of reading the same stored values.
        asked = config.reference
        mode = "auto" if config.adapter and asked.path is None else "resident" if config.adapter else "offloaded"
        reference = ReferenceConfig(mode=mode, path=asked.path, adapter=asked.adapter)
        config = config.model_copy(update={"reference": reference})
    if config.megatron.fp8_recipe:
        if rank == 0:
            say("megatron.transformer.fp8: left out, because FP8 rounds differently in each layout")
        config = without_fp8(config)
    if fp64 and config.megatron.tp_comm_overlap:
        if rank == 0:
            say("megatron.transformer.tp_comm_overlap: left out, because Transformer Engine does not support fp64")
        config = without_overlap(config)
    usual = {"attention": "auto"} if config.model.attention == "te" else {}
    usual |= {"flash_attention": 2} if config.model.flash_attention != 2 else {}
    if fp64 and usual:
        if rank == 0:
            say(f"model.{' and model.'.join(usual)}: left out, because the selected kernels do not support fp64")
        config = config.model_copy(update={"model": config.model.model_copy(update=usual)})
    parallel, alone = config.parallel, ParallelConfig(timeout_s=config.parallel.timeout_s)
    on_device = config.optim.model_copy(update={"states": "device"})
    if fp64:
        parallel, alone = (side.model_copy(update={"distributed_optimizer": False}) for side in (parallel, alone))
        ddp = {name: value for name, value in config.megatron.ddp.items() if name not in WITH_SHARDS}
        megatron = config.megatron.model_copy(update={"ddp": ddp})
        config = config.model_copy(update={"parallel": parallel, "megatron": megatron, "optim": on_device})
    ranks = world if world > 1 else ParallelDims.fewest(parallel)
    with tempfile.TemporaryDirectory(prefix="dpo-parity-") as folder:
        if world > 1:
            many = measure(config, fp64=fp64)
            if rank != 0:
                return True
        else:
            many = _measure_in_processes(config, ranks, Path(folder) / "many", fp64=fp64)
        plain = without_graphs(config).model_copy(
            update={
                "parallel": alone,
                "batch": BatchConfig(layout="stacked"),
                "megatron": MegatronConfig(),
                "optim": on_device,
            }
        )
        # A loss that wrongly depends on its micro-batch is noticed only if the two runs have different micro-batches.
        size = 1 if many["largest"] > 1 else 2
        plain = plain.model_copy(update={"train": plain.train.model_copy(update={"micro_batch_size": size})})
        one = _measure_in_processes(plain, 1, Path(folder) / "one", fp64=fp64)
    found = differences(one, many)
    layout = f"tp {parallel.tp}, pp {parallel.pp}, vpp {parallel.vpp or 1}, cp {parallel.cp}"
    if parallel.ep > 1 or parallel.etp:
        layout += f", ep {parallel.ep}, etp {ParallelDims.of(parallel, ranks).etp}"
    layout += f" on {_count(ranks, 'rank')}"
    layout += f", {many['layout']} micro-batches of up to {_count(many['largest'], 'pair')}"
    computed = many["dtype"] + (", native layers and plain AdamW" if fp64 else "")
    steps, pairs = len(many["steps"]), len(many["steps"][0]["pairs"])
    say(
        f"{_count(steps, 'step')} of {_count(pairs, 'pair')} in {computed}: {layout}, compared with one process "
        f"and stacked micro-batches of up to {_count(one['largest'], 'pair')}"
    )
    for line in table(found):
        say(f"  {line}")
    return all(one.equal for row in found.values() for one in row)


def _measure_in_processes(config: Config, ranks: int, folder: Path, *, fp64: bool) -> dict[str, Any]:
    """Run :func:`measure` in new processes on this machine, because this process must not occupy device memory."""
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
        return EngineError(f"parity: the run with {_count(ranks, 'rank')} failed; read its output above")
    failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
    error = EngineError(failure["problems"])
    error.exit_code = failure["exit_code"]
    return error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def main(folder: str, *options: str) -> None:
    """Measure the run in ``folder`` and write the results there. :func:`_measure_in_processes` starts this function."""
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
