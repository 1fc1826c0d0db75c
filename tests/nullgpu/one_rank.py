"""Run steps on the null GPU as one rank of a run of any size, and report how the rank uses the device.

    tests/nullgpu/nullgpu python tests/nullgpu/one_rank.py --model llama3_8b --world 8 parallel.tp=2

Positional arguments are configuration keys. A step does the same as a step of the trainer: it takes data that was
prepared one step ahead, runs the reference and train_step, and then lets the ranks agree whether to stop.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUIRED_OPTIONS = {"mix": {"losses": [{"name": "sigmoid"}, {"name": "sft"}]}}
REQUIRED_OPTIONS["mpo"] = REQUIRED_OPTIONS["mix"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama3_8b", help="a name from shapes.py")
    add("--layers", type=int, help="number of layers (default: the model's)")
    add("--world", type=int, default=1, help="number of ranks in the run")
    add("--rank", type=int, default=0)
    add("--pairs", type=int, default=2, help="pairs per step and data-parallel rank")
    add("--lengths", default="2048,1024,1024", help="tokens of the prompt, the chosen and the rejected response")
    add("--vary", action="store_true", help="give pairs different lengths, from 0.3 to 1 times --lengths")
    add("--steps", type=int, default=2, help="number of steps; the first one creates Adam's moments")
    add("--waits", action="store_true", help="print where the host waits in the last step")
    add("--compile", action="store_true", help="use torch.compile, as training runs do; the start is faster without it")
    add("--losses", action="store_true", help="finally, run one more step with each registered loss")
    add("--snapshot", help="file for torch's memory snapshot (see https://pytorch.org/memory_viz)")
    add("--json", help="file for the whole report")
    add("keys", nargs="*", help="configuration, such as parallel.tp=2 model.recompute=full reference.mode=stored")
    return parser.parse_intermixed_args()  # options can stand between the keys


asked = arguments()
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.update(RANK=str(asked.rank), WORLD_SIZE=str(asked.world), LOCAL_RANK=str(asked.rank % 8))
# Turn off two features of torch's NCCL backend that need other ranks: the heartbeat monitor and the dump on timeouts.
os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
os.environ.pop("MASTER_ADDR", None)
os.environ.setdefault("UB_SKIPMC", "1")  # multicast memory would need other ranks
if not asked.compile:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

import dpo_engine.training.engine as engine_module  # noqa: E402
import dpo_engine.training.step as step_module  # noqa: E402
from card import Card, attention_launches, waits, waits_by_line  # noqa: E402
from dpo_engine.config.run import Config  # noqa: E402
from dpo_engine.data.dataset import PairDataset, TokenPair  # noqa: E402
from dpo_engine.data.pair_writer import PairWriter  # noqa: E402
from dpo_engine.model.batch_size import largest_micro_batch  # noqa: E402
from dpo_engine.model.memory import Memory, stage_memory  # noqa: E402
from dpo_engine.objective.losses import LOSSES  # noqa: E402
from dpo_engine.scoring.reference import Reference, StoredReference  # noqa: E402
from dpo_engine.scoring.store import VALUES, Rows, keys  # noqa: E402
from dpo_engine.training.bad_steps import BadSteps  # noqa: E402
from dpo_engine.training.engine import Engine  # noqa: E402
from dpo_engine.training.interruption import Interruption  # noqa: E402
from dpo_engine.training.next_step import OneAhead, one_ahead, step_data  # noqa: E402
from dpo_engine.training.objective import Objective  # noqa: E402
from dpo_engine.training.out_of_memory import explanation  # noqa: E402
from dpo_engine.training.references import open_reference  # noqa: E402
from lone_rank import replace_numbers, replace_peers  # noqa: E402
from shapes import write_shape  # noqa: E402

GIB = 1 << 30


def configuration(folder: Path, given: list[str]) -> Config:
    """Build the run's configuration: the keys from the command line, and defaults for all other keys."""
    values: dict[str, Any] = {
        # Measure native layers, even if Transformer Engine is installed.
        "model": {"path": str(write_shape(asked.model, folder, asked.layers)), "spec": "native"},
        "data": {"train": "none.jsonl", "max_length": 65536},
        "train": {"output_dir": str(folder / "output")},
        "batch": {"layout": "stacked"},
        "reference": {"verify": 0},
    }
    for text in given:
        key, value = text.split("=", 1)
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    parallel = values.get("parallel", {})
    copies = asked.world // math.prod(parallel.get(name, 1) for name in ("tp", "pp", "cp"))
    values["train"]["global_batch_size"] = asked.pairs * copies
    if not any("micro_batch" in text for text in given):
        values["train"]["micro_batch_size"] = 1
    return Config.model_validate(values)


def synthetic_pairs(path: Path, count: int) -> PairDataset:
    """Write random pairs to a file of token pairs, in the format that tokenizing writes, and open the file."""
    draw = np.random.default_rng(0)
    longest = np.array([int(text) for text in asked.lengths.split(",")])
    with PairWriter(path) as writer:
        for number in range(count):
            shares = draw.uniform(0.3, 1.0, 3) if asked.vary else np.ones(3)
            lengths = np.maximum(2, (longest * shares).astype(int))
            ids = [draw.integers(10, 1000, length).astype(np.int32) for length in lengths]
            judged = {"margin": 1.0, "chosen_reward": 1.0, "rejected_reward": 0.0}
            writer.add(TokenPair(*ids, weight=1.0, digest=f"{number + 1:032x}", source=0, **judged))
        writer.finish({})
    return PairDataset(path, ["synthetic"])


class OneRank:
    """One rank's engine, policy, reference and data, with counts of events for each phase of a step.

    parts       device memory of each part of the state (such as weights or gradients), in bytes
    start_peak  peak of the allocated device memory before the first step, in bytes
    phases      counts of events in each phase of the current step
    """

    def __init__(self, config: Config, folder: Path):
        self.config = config
        self.card = Card()
        self.parts: dict[str, int] = {}
        self.phases: dict[str, Counter[str]] = {}
        replace_peers(self.card, asked.rank, asked.world)
        replace_numbers()
        # Engine.open sets environment variables that CUDA and torch read only when they first use the GPU.
        assert not torch.cuda.is_initialized()
        self.engine = Engine.open(config)
        per_step = asked.pairs * self.engine.groups.dims.dp
        self.pairs = synthetic_pairs(folder / "pairs.arrow", per_step * asked.steps)
        self.plan = np.arange(len(self.pairs)).reshape(asked.steps, per_step)
        self.steps = OneAhead(lambda step: step_data(self.engine, self.pairs, self.plan[step]), asked.steps)
        self.batches_s = 0.0
        self.step = 0
        self.chosen = self.engine.settle_batches(self.pairs)
        self._measure("gradients", engine_module, "wrap_policy")
        self._measure("main_weights", engine_module, "build_optimizer")
        with self._measured("weights"):
            self.trained = self.engine.load_policy(total_steps=100)
        self.parts["weights"] -= self.parts["gradients"] + self.parts["main_weights"]
        with self._measured("reference"):
            self.reference = self._reference()
        self.start_peak = torch.cuda.max_memory_allocated()
        self.bad_steps = BadSteps(config.bad_steps, self.engine.groups.world, self.engine.platform.device)
        self.interruption = Interruption()
        self._count("reference", self.reference, "logps")
        self._count("pipeline", step_module, "run_pipeline")

    def _reference(self) -> Reference:
        if self.config.reference.mode == "stored":
            # On the null GPU, reference scores can be infinite or NaN, so they cannot fill a store. Zeros suffice.
            rows = Rows.empty().with_more(
                keys(self.pairs.digests), np.zeros((len(self.pairs), len(VALUES)), np.float32)
            )
            return StoredReference(rows, groups=self.engine.groups)
        return open_reference(self.engine, self.trained.chunks, pairs=[self.pairs], upcoming=self.upcoming)

    def upcoming(self) -> Iterator[list[Any]]:
        """Yield the micro-batches of the next steps. An offloaded reference scores them in advance, as in training."""
        steps = range(self.step, min(self.step + self.config.reference.ahead, len(self.plan)))
        for data in one_ahead(lambda step: step_data(self.engine, self.pairs, self.plan[step]), steps):
            yield data.batches()

    @contextmanager
    def _measured(self, part: str) -> Iterator[None]:
        before = torch.cuda.memory_allocated()
        yield
        self.parts[part] = torch.cuda.memory_allocated() - before

    def _measure(self, part: str, module: Any, name: str) -> None:
        real = getattr(module, name)

        def measured(*rest: Any, **named: Any) -> Any:
            with self._measured(part):
                return real(*rest, **named)

        setattr(module, name, measured)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the events inside the block, and add them to a phase of the step."""
        before = self.card.counts()
        yield
        counts = self.card.counts()
        counts.subtract(before)
        self.phases.setdefault(name, Counter()).update(counts)

    def _count(self, phase: str, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*rest: Any, **named: Any) -> Any:
            with self.phase(phase):
                return real(*rest, **named)

        setattr(owner, name, counted)

    def take_step(self, step: int, objective: Objective) -> int:
        """Run one step as the trainer does. Return the number of micro-batches."""
        engine, started = self.engine, time.perf_counter()
        with self.phase("batches"):
            data = self.steps.take(step)
            batches = data.batches()
            self.steps.begin(step + 1)
        self.batches_s = time.perf_counter() - started
        with self.phase("step"):
            step_module.train_step(
                self.trained, self.reference, batches, objective, known=data.known,
                vocab_size=engine.arch.vocab_size, groups=engine.groups, refuses=self.bad_steps.refuses,
            )  # fmt: skip
        with self.phase("agreement"):
            engine.platform.synchronize()
            self.interruption.agreed(engine.groups.world, engine.platform.device, after="step")
        self.step = min(self.step + 1, asked.steps - 1)
        return len(batches)

    def examine(self, step: int) -> dict[str, Any]:
        """Run one step and return its figures."""
        self.phases = {}
        torch.cuda.reset_peak_memory_stats()
        before, started = self.card.details(), time.perf_counter()
        micro_batches = self.take_step(step, self.engine.objective)
        host_s = time.perf_counter() - started
        details = self.card.details()
        for kind, counts in details.items():
            counts.subtract(before[kind])
        phases = self.phases
        total: Counter[str] = Counter()  # not a sum with "+", which would omit zeros
        for name in ("batches", "step", "agreement"):
            total.update(phases[name])
        inside = waits(phases["pipeline"]) + waits(phases.get("reference", Counter()))
        return {
            "host_s": host_s,
            "batches_s": self.batches_s,
            "micro_batches": micro_batches,
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "after": torch.cuda.memory_allocated(),
            "outside": outside_torch(),
            "waits_in_micro_batches": inside,
            "waits_besides": waits(total) - inside - phases["agreement"]["device_waits"],
            "waits_of_the_clock": phases["agreement"]["device_waits"],
            "attention_launches": attention_launches(details["kernel"]),
            "model_launches": phases["pipeline"]["launches"] + phases.get("reference", Counter())["launches"],
            "counts": dict(total),
            "phases": {name: dict(counts) for name, counts in phases.items()},
            "kernels": {name: calls for name, calls in details["kernel"].most_common() if calls},
            "collectives": {name: calls for name, calls in details["collective"].most_common() if calls},
        }


def every_loss(rank: OneRank) -> dict[str, str]:
    """Run one step with each registered loss. Return each loss's error, or an empty string if the step succeeded."""
    results = {}
    for name in sorted(LOSSES):
        loss = rank.config.loss.model_validate({"name": name, **REQUIRED_OPTIONS.get(name, {})})
        try:
            objective = Objective(LOSSES[name], loss.options, **loss.token_weighting, entropy=False)
            rank.take_step(len(rank.plan) - 1, objective)
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:300]
    return results


def outside_torch() -> int:
    """Return the bytes of device memory in use outside of torch's allocator, for example by the CUDA context."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def estimate(rank: OneRank) -> Memory:
    """Return the memory that `check` would estimate for this rank's stage.

    ``max_length`` is set to the prompt's number of tokens in ``--lengths`` plus that of the longer response.
    """
    engine, (prompt, chosen, rejected) = rank.engine, (int(text) for text in asked.lengths.split(","))
    config = engine.config.model_copy(
        update={"data": engine.config.data.model_copy(update={"max_length": prompt + max(chosen, rejected)})}
    )
    dtype, dims = "bf16" if engine.dtype is torch.bfloat16 else "fp32", engine.groups.dims
    tokens = largest_micro_batch(config, engine.arch, dims, dtype=dtype, device_memory=None)
    return stage_memory(config, engine.arch, dims, engine.groups.pp.rank(), dtype, tokens)


def main() -> int:
    """Run the steps, print a summary, and return the exit code."""
    say = partial(print, flush=True)
    folder = Path(tempfile.mkdtemp())
    rank = OneRank(configuration(folder, asked.keys), folder)
    say(*rank.engine.describe(), *rank.chosen, sep="\n")
    expected = estimate(rank)
    parts = {part: round(size / GIB, 2) for part, size in rank.parts.items()}
    say("GiB:", parts, f"expected state {expected.constant / GIB:.2f}, expected peak {expected.peak / GIB:.2f}")
    report: dict[str, Any] = {"parts": rank.parts, "start_peak": rank.start_peak, "steps": [], "chosen": rank.chosen}
    report["tokens_per_micro_batch"] = rank.engine.config.batch.tokens_per_micro_batch
    report |= {"expected_constant": expected.constant, "expected_peak": expected.peak}
    if asked.snapshot:
        torch.cuda.memory._record_memory_history(stacks="python", context="alloc")
    for step in range(asked.steps):
        last = step == asked.steps - 1
        try:
            if asked.waits and last:
                with waits_by_line() as places:
                    figures = rank.examine(step)
                report["waits_by_line"] = dict(places.most_common())
            else:
                figures = rank.examine(step)
        except torch.OutOfMemoryError as error:
            report["out_of_memory"] = explanation(rank.engine, error, scoring=False)
            say(*report["out_of_memory"], sep="\n")
            break
        report["steps"].append(figures)
        sizes = ", ".join(f"{name} {figures[name] / GIB:.2f}" for name in ("peak", "reserved", "after"))
        named = ("micro_batches", "waits_in_micro_batches", "waits_besides", "model_launches", "attention_launches")
        say(f"step {step}: {figures['host_s']:.2f} s, GiB {sizes};", {name: figures[name] for name in named})
        say("  ", {name: number for name, number in figures["counts"].items() if number})
    for place, number in report.get("waits_by_line", {}).items():
        say(f"  {number:4d} x wait at {place}")
    if asked.losses:
        report["losses"] = every_loss(rank)
        say("losses:", {name: why or "ok" for name, why in report["losses"].items()})
    if asked.snapshot:
        torch.cuda.memory._dump_snapshot(asked.snapshot)
    if asked.json:
        Path(asked.json).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # destroying process groups would wait for ranks that do not exist
