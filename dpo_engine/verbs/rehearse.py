"""What a run survives, shown on the run itself: some steps of it are killed, stopped, continued, and compared.

The ranks are processes of this machine, started as srun would start them. Each rehearsal trains in a directory of its
own under ``<train.output_dir>/rehearsal``; nothing of the run is touched but its caches.
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
from dpo_engine.platform.parallel import world_from_environment
from dpo_engine.verbs import console

SAVE_INTERVAL = 2
STEPS = 3 * SAVE_INTERVAL
GRACE_S = 30
CLOCK = {"step_time_s", "pairs_per_s", "tokens_per_s", "mfu", "peak_memory_bytes"}
"""Metrics that say how fast a step was, and nothing of what it computed."""


class Rehearsal(NamedTuple):
    """One thing that happens to a run, and how the run then has to end.

    told  whether the run is told to stop, and has to say that it is saved
    kept  steps that the next start may continue after; a save of the last of them may have been in flight
    """

    name: str
    fault: str
    told: bool
    kept: tuple[int, ...]


def rehearsals(last_rank: int) -> list[Rehearsal]:
    """What is rehearsed on ranks 0 to ``last_rank``."""
    first, second = SAVE_INTERVAL, 2 * SAVE_INTERVAL
    return [
        Rehearsal("a rank is killed in a step", f"optimizer:{last_rank}:{second + 1}:kill", False, (first, second)),
        Rehearsal("a rank is killed while it saves", "save-shard:0:2:kill", False, (first,)),
        Rehearsal("the disk is full while it saves", f"save-shard:{last_rank}:2:enospc", False, (first,)),
        Rehearsal("all ranks are told to stop", f"step:*:{first + 1}:term", True, (first + 1,)),
    ]


def rehearse(config: Config, *, world: int | None = None, say: Callable[[str], None] = console.say) -> bool:
    """Kill, stop and resume the first steps of a run, and compare the metrics with an uninterrupted run.

    world   ranks to start on this machine; None: as few as the layout needs
    say     called with the lines of the report

    Returns  whether every resumed run ended with the numbers of the uninterrupted one

    Raises :class:`~dpo_engine.errors.ConfigError` inside a run of several ranks, and
    :class:`~dpo_engine.errors.EngineError` when the uninterrupted run does not reach its end.
    """
    if world_from_environment()[1] > 1:
        raise ConfigError("rehearse: starts the ranks itself; start it alone, with --world-size N")
    parallel = config.parallel
    world = world or parallel.tp * parallel.pp * parallel.cp
    folder = Path(config.train.output_dir) / "rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run.yaml"
    run.write_text(config.to_yaml(), encoding="utf-8")
    say(f"{world} ranks, {STEPS} steps, a checkpoint every {SAVE_INTERVAL}; in {folder}")
    codes, said = _start(config, run, folder / "whole", world)
    if any(codes):
        raise EngineError(
            f"{folder / 'whole'}: the run does not reach step {STEPS} when it is left alone: {_last_line(said)}"
        )
    expected = _trajectory(folder / "whole")
    if len(expected) < STEPS:
        raise EngineError(
            f"{config.train.output_dir}: a rehearsal takes {STEPS} steps, and the run has {len(expected)}"
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
        wrong.append(f"exit codes {codes}, not {Interrupted.exit_code} on every rank")
    if not all(codes):
        wrong.append(f"exit codes {codes}: a rank took it for a success")
    if not wrong:
        codes, said = _start(config, run, output, world)
        if any(codes):
            wrong.append(f"started again, it ended with exit codes {codes}")
        elif (step := _resumed_after(said)) not in case.kept:
            wrong.append(f"started again, it continued after step {step}, not after {_either(case.kept)}")
        elif _trajectory(output) != expected:
            wrong.append("started again, it gave other numbers than the run left alone")
    say(f"{case.name}: " + ("; ".join(wrong) or f"continued after step {step}, the same numbers"))
    if wrong:
        say(f"  DPO_FAULT={case.fault}; {output} is kept. The first rank's last words: {_last_line(said)}")
    return not wrong


def train_command(config: Config, run: Path, output: Path) -> list[str]:
    """The command line of each rank.

    run  the file of the run
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
        "data.validation=null",
        "logging.log_interval=1",
        *("logging.tensorboard=false", "logging.wandb=null", "logging.mlflow=null", "logging.progress=plain"),
    ]
    for name in ("warmup_steps", "decay_steps"):
        if (steps := getattr(config.optim, name)) is not None:
            command.append(f"optim.{name}={min(steps, SAVE_INTERVAL)}")  # the whole schedule fits
    if config.reference.mode == "stored":
        command.append(f"reference.store={config.store_path}")
    return command


def _start(config: Config, run: Path, output: Path, world: int, fault: str = "") -> tuple[list[int], str]:
    """Train some steps of the run in ``output``; returns the ranks' exit codes and what the first one printed."""
    command = train_command(config, run, output)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "DPO_FAULT": fault}
    shared["SLURM_RESTART_COUNT"] = "0"  # which would leave the faults out
    output.parent.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in range(world):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(f"{output}.rank_{rank}.log", "ab") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.1)
        # The others notice by themselves, by their collectives' timeout at the latest.
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
    """The step that the last start continued after, 0 for one that began anew."""
    found = re.findall(r"^resumed after step (\d+)$", said, re.M)
    return int(found[-1]) if found else 0


def _either(steps: tuple[int, ...]) -> str:
    return " or ".join(map(str, steps))


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["none"])[-1]
