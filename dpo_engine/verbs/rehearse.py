"""``dpo-engine rehearse``: test with injected faults whether a user's own run resumes correctly.

The test trains the first steps of the run without a fault. Then it does the following for each fault: it starts the run
from the beginning, injects the fault, resumes the run, and compares the metrics with those of the uninterrupted run.
Each rank is a process on this machine. The process reads its rank and the address of rank 0 from environment variables.
Each fault has its own directory under ``<train.output_dir>/rehearsal``. Outside ``rehearsal``, the test changes only
the cache of tokenized data and the reference store.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, EngineError, Interrupted
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.launcher import world_from_environment
from dpo_engine.verbs import console

SAVE_INTERVAL = 2
STEPS = 3 * SAVE_INTERVAL
GRACE_S = 30
CLOCK = {
    "time",
    "step_time_s",
    "pairs_per_s",
    "tokens_per_s",
    "layout_gain",
    "mfu",
    "peak_memory_bytes",
    "reserved_memory_bytes",
}
"""Metrics for time, speed and memory. They can differ although all results are equal, so they are not compared."""


class Rehearsal(NamedTuple):
    """One fault and the expected outcome.

    name   description for the report
    fault  value of ``DPO_FAULT``
    told   whether the fault requests a clean stop; if so, every rank must save and exit with code 75
    kept   steps after which the restarted run is allowed to resume; there are several if a save can be in progress when
           the fault occurs
    """

    name: str
    fault: str
    told: bool
    kept: tuple[int, ...]


def rehearsals(last_rank: int) -> list[Rehearsal]:
    """Return the test cases for a run with the ranks 0 to ``last_rank``."""
    first, second = SAVE_INTERVAL, 2 * SAVE_INTERVAL
    return [
        Rehearsal("a rank is killed during a step", f"optimizer:{last_rank}:{second + 1}:kill", False, (first, second)),
        Rehearsal("a rank is killed during a save", "save-shard:0:2:kill", False, (first,)),
        Rehearsal("the disk is full during a save", f"save-shard:{last_rank}:2:enospc", False, (first,)),
        Rehearsal("all ranks receive SIGTERM", f"step:*:{first + 1}:term", True, (first + 1,)),
    ]


def rehearse(config: Config, *, world: int | None = None, say: Callable[[str], None] = console.say) -> bool:
    """Train the first steps of a run without a fault. Then, for each fault, train, resume, and compare the metrics.

    world   number of ranks to start on this machine; None: the smallest number that the layout allows
    say     called with each line of the report

    Returns  whether every fault had the expected outcome, and every resumed run has the same metrics as the
             uninterrupted run

    Raises :class:`~dpo_engine.errors.ConfigError` if this is called under torchrun or srun with several ranks, and
    :class:`~dpo_engine.errors.EngineError` if the uninterrupted run fails or is too short.
    """
    if world_from_environment()[1] > 1:
        raise ConfigError(
            "rehearse: must run in a single process, because this verb starts the ranks itself; run it without "
            "torchrun or srun, with --world-size N"
        )
    parallel = config.parallel
    world = world or ParallelDims.fewest(parallel)
    folder = Path(config.train.output_dir) / "rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run.yaml"
    run.write_text(config.to_yaml(), encoding="utf-8")
    ranks = f"{world} rank{'' if world == 1 else 's'}"
    say(f"{ranks}, {STEPS} steps, a checkpoint every {SAVE_INTERVAL} steps; directory: {folder}")
    codes, said = _start(config, run, folder / "whole", world)
    if any(codes):
        raise EngineError(f"{folder / 'whole'}: the uninterrupted run did not reach step {STEPS}: {_last_line(said)}")
    expected = _trajectory(folder / "whole")
    if len(expected) < STEPS:
        raise EngineError(
            f"{config.train.output_dir}: a rehearsal needs {STEPS} steps, but the run has only {len(expected)}; raise "
            "train.epochs, or lower train.global_batch_size"
        )
    held = [_one(case, expected, config, run, folder, world, say) for case in rehearsals(world - 1)]
    if all(held):
        shutil.rmtree(folder)
    return all(held)


def _one(
    case: Rehearsal,
    expected: list[dict[str, Any]],
    config: Config,
    run: Path,
    folder: Path,
    world: int,
    say: Callable[[str], None],
) -> bool:
    output = folder / case.name.replace(" ", "-")
    codes, said = _start(config, run, output, world, case.fault)
    wrong = []
    if case.told and set(codes) != {Interrupted.exit_code}:
        wrong.append(f"exit codes {codes}, expected {Interrupted.exit_code} on every rank")
    if not all(codes):
        wrong.append(f"exit codes {codes}, but no rank may exit with 0 after this fault")
    if not wrong:
        codes, said = _start(config, run, output, world)
        if any(codes):
            wrong.append(f"the restarted run ended with exit codes {codes}")
        elif (step := _resumed_after(said)) not in case.kept:
            wrong.append(f"the restarted run resumed after step {step}, expected {_either(case.kept)}")
        elif _trajectory(output) != expected:
            wrong.append("the metrics of the restarted run differ from those of the uninterrupted run")
    say(f"{case.name}: " + ("; ".join(wrong) or f"resumed after step {step}, identical metrics"))
    if wrong:
        say(f"  DPO_FAULT={case.fault}; files kept in {output}; last line of rank 0: {_last_line(said)}")
    return not wrong


def train_command(config: Config, run: Path, output: Path) -> list[str]:
    """Return the command that every rank runs.

    run     YAML file of the run
    output  directory in which to train, instead of train.output_dir
    """
    command = [
        *(sys.executable, "-m", "dpo_engine", "train", str(run)),
        f"train.output_dir={output}",
        f"data.cache_dir={config.cache_dir}",
        f"train.max_steps={STEPS}",
        f"checkpoint.save_interval={SAVE_INTERVAL}",
        "checkpoint.export=false",
        "checkpoint.resume=true",
        "train.save_by=null",
        "train.eval_interval=0",
        "train.eval_at_start=false",
        "train.stop_after_no_gain=null",
        "checkpoint.keep_best=null",
        "data.validation=null",
        "logging.log_interval=1",
        *("logging.tensorboard=false", "logging.wandb=null", "logging.mlflow=null", "logging.sinks={}"),
        *("logging.profile=null", "logging.progress=plain"),
    ]
    for name in ("warmup_steps", "decay_steps"):
        if (steps := getattr(config.optim, name)) is not None:
            command.append(f"optim.{name}={min(steps, SAVE_INTERVAL)}")  # fit the whole schedule into STEPS
    if config.reference_mode == "stored":
        command.append(f"reference.store={config.store_path}")
    return command


def _start(config: Config, run: Path, output: Path, world: int, fault: str = "") -> tuple[list[int], str]:
    """Train the first steps, with ``output`` as output directory. Return all exit codes and what rank 0 printed."""
    command = train_command(config, run, output)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "DPO_FAULT": fault}
    shared["SLURM_RESTART_COUNT"] = "0"  # a restarted Slurm job would ignore DPO_FAULT
    output.parent.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in range(world):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(f"{output}.rank_{rank}.log", "ab") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.1)
        # The other ranks detect the lost rank themselves, at the latest when their collectives time out.
        deadline = time.monotonic() + config.parallel.timeout_s + GRACE_S
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.wait() for rank in ranks]
    return codes, Path(f"{output}.rank_0.log").read_text(encoding="utf-8", errors="replace")


def _trajectory(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def _resumed_after(said: str) -> int:
    """Return the step after which a restarted run resumed, or 0 if the run started from scratch."""
    found = re.findall(r"^(?:[\d:-]+ )*resumed after step (\d+)$", said, re.M)
    return int(found[-1]) if found else 0


def _either(steps: tuple[int, ...]) -> str:
    return " or ".join(map(str, steps))


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["none"])[-1]
