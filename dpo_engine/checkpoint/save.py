"""Save checkpoints in the background, atomically.

The problem: writing the weights and optimizer state of a large model takes minutes. Training should continue meanwhile,
and a crash at any moment must leave an intact checkpoint.

The solution: `Saver.save` copies this rank's state to host memory and returns; training continues while a thread
writes the copy. A save has three parts:

1. Each rank writes its shard. Rank 0 also copies `metrics.jsonl`.
2. Rank 0 writes the manifest, with the size and SHA-256 of every other file, and renames the directory to its final
   name.
3. Rank 0 updates the files `latest` and `best`, and removes old checkpoints.

No rank starts a part before all ranks have finished the previous part. Files are synced to disk before the rename, so
a directory with a final name is always complete. A process that dies before the rename leaves a `.tmp` directory.
Loading ignores this directory, and the next start removes it. If any rank fails to write, all ranks raise the same
error.

Why this way: the writer threads never communicate. Only the main thread runs collectives: between steps, `advance`
reduces one flag and starts the next part when all ranks are ready. If two threads ran collectives, their order could
differ between ranks, and the ranks would hang. No rank waits in a collective for another rank's files, because slow
storage must not end a run; see :mod:`~dpo_engine.platform.long_work`. Synchronous saves run the same code without the
thread. Checkpoints contain safetensors and JSON files but no pickles, so loading a checkpoint cannot execute code.

Not covered: the host memory for the copy of each rank's state remains allocated between saves. If a save is still
running when the next one is due, training waits. If the process dies during a save, that checkpoint is lost and the
previous checkpoint remains. All ranks must see the same file system, and this file system must rename directories
atomically.
"""

import secrets
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.atomic_files import make_directory
from dpo_engine.checkpoint import directory as directories
from dpo_engine.checkpoint.best import choose, must_save
from dpo_engine.checkpoint.directory import FORMAT, HISTORY, MANIFEST
from dpo_engine.checkpoint.load import as_checkpoint_error, frozen_parameters, placed_slices, unless_taken_over
from dpo_engine.checkpoint.shards import copy_to_host, write_shard
from dpo_engine.config.sections import KeepBest
from dpo_engine.faults import reach
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.table import placed_parameters
from dpo_engine.optim.optimizer import Trained
from dpo_engine.optim.state import adam_step, set_adam_step
from dpo_engine.platform.long_work import Meter, from_first, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.platform.random_state import random_state
from dpo_engine.scoring.reference import exact

Job = Callable[[], Any]
CHECK_STORAGE = "check the storage and restart the job"


class Saver:
    """Write a run's checkpoints, one at a time.

    identity      settings and data that determine the run's results; see :mod:`~dpo_engine.checkpoint.identity`
    keep_last     number of newest checkpoints to keep, at least 2
    keep_best     metric that selects the best checkpoints, which are also kept; None: keep only the newest checkpoints
    asynchronous  whether to copy this rank's state to host memory, and write the copy in a thread during later steps
    history       path of the run's metrics.jsonl
    following     model chunks, or values of adapters, of a reference that is periodically updated from the policy
                  (``reference.sync_every``); checkpoints then include these chunks or values
    passed_over   names of checkpoint directories known to be damaged
    confirm       called before files are written or removed; raises an error if another run has taken over `folder`
    saved         called on every rank with the directory of each completed checkpoint

    *Collectives*, in the constructor: one broadcast of an object from rank 0.
    """

    def __init__(
        self,
        folder: Path,
        trained: Trained,
        arch: Architecture,
        groups: ParallelGroups,
        identity: dict[str, Any],
        *,
        keep_last: int,
        keep_best: KeepBest | None = None,
        asynchronous: bool,
        device: torch.device,
        history: Path,
        following: Sequence[torch.nn.Module] = (),
        passed_over: Sequence[str] = (),
        confirm: Callable[[], None] = lambda: None,
        saved: Callable[[Path], None] = lambda directory: None,
    ):
        self.folder = folder
        self.trained, self.arch, self.groups = trained, arch, groups
        self.identity = identity
        self.keep_best = keep_best
        self.asynchronous = asynchronous
        self.history = history
        self.following = following
        self.damaged = set(passed_over)
        self._kept = {"keep_last": keep_last, "keep_best": keep_best, "damaged": self.damaged}
        self.confirm = confirm
        self.saved = saved
        self.took_s = 0.0  # duration of the last completed save, on the slowest rank
        self._spent_s = 0.0  # time spent so far on the current save
        self._first = groups.world.rank() == 0
        self._flag = torch.zeros((), dtype=torch.int64, device=device)
        self._host: dict[str, Tensor] = {}
        self._meter = Meter()  # progress of the current save
        self._parts: Generator[Job, Any, Path] | None = None  # the parts of the current save
        self._running: Future | None = None  # the part of the current save that is running
        self._work: Job | None = None  # runs that part, and then sets the result of `_running`
        run_id = [secrets.token_hex(4)]
        dist.broadcast_object_list(run_id, group=groups.world, group_src=0)
        self._run_id = run_id[0]

    def save(self, step: int, run: dict[str, Any]) -> None:
        """Save the state after ``step`` optimizer steps. ``run`` is a JSON value to store in the manifest.

        If the previous save is not complete, finish it first. Return as soon as training can change the state again. An
        asynchronous save completes later, in :meth:`advance` or :meth:`finish`.

        *Collectives* and errors: those of :meth:`finish`; also two all-gathers of objects.
        """
        self.finish()
        started = time.perf_counter()
        updates = adam_step(self.trained)
        tensors = self._state()
        if updates == 0:  # _state() created the moments, and torch's AdamW then also requires a step count
            set_adam_step(self.trained, 0)
        if self.asynchronous:
            tensors = copy_to_host(tensors, self._host)
        # Copy metrics.jsonl only up to its current length: later steps append to it while the thread copies.
        measure, reading = as_checkpoint_error(self._history_length, self.history), Meter("reading metrics.jsonl")
        length = without_time_limit(self.groups.world, measure, reading)
        manifest = {
            "format": FORMAT,
            "step": step,
            "schedule": self.trained.schedule.num_steps,
            "layout": asdict(self.groups.dims),
            "identity": self.identity,
            "run": run,
        }
        self._spent_s = time.perf_counter() - started
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._meter = Meter(f"saving the checkpoint for step {step}", size)
        self._parts = self._in_parts(manifest, updates, tensors, length)
        self._start(next(self._parts))
        if not self.asynchronous:
            self.finish()

    @property
    def in_flight(self) -> bool:
        """Whether a save has been started and is not complete yet."""
        return self._running is not None

    def advance(self) -> None:
        """Start the next part of the current save if every rank has finished the current part. Call between steps.

        *Collectives* over all ranks: none without a current save. During a save, one all-reduce (MIN) of a number and,
        when the next part starts, the collectives of :meth:`finish`.
        """
        if self._running is None:
            return
        self._flag.fill_(int(self._running.done()))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MIN, group=self.groups.world)
        if int(self._flag):
            self._next()

    def finish(self) -> None:
        """Wait until the current save is complete. The wait has no time limit.

        *Collectives*: a few all-gathers and one broadcast of objects over all ranks.
        Raises :class:`~dpo_engine.errors.CheckpointError` on every rank if any rank cannot write its files. If this
        happens before the directory is renamed, the checkpoint's files are removed. Earlier checkpoints are unchanged.
        """
        while self._running is not None:
            self._next()

    def is_best(self, step: int) -> bool:
        """Return whether ``step``, which has just been evaluated, is among the best. ``keep_best`` must be set.

        If the step seems to be among the best, finish the current save, because the step that is being saved may
        be better. Then decide again.

        *Collectives* and errors: those of ``from_first`` for each decision, and those of :meth:`finish`.
        """
        asked = partial(must_save, self.folder, step, self.history, keep_best=self.keep_best, damaged=self.damaged)
        decide = as_checkpoint_error(asked, self.folder, CHECK_STORAGE)
        found = from_first(self.groups.world, decide, Meter("reading metrics.jsonl"))
        if found and self.in_flight:
            self.finish()
            found = self.is_best(step)
        return found

    def judged(self) -> None:
        """After the evaluation of a saved step, choose the best checkpoints again, and remove old checkpoints.

        *Collectives*: with ``keep_best``, two all-gathers of objects. The removal between them has no time limit.
        """
        if self.keep_best is None:
            return

        def choose_again() -> None:
            if self._first and (there := directories.intact(self.folder, self.damaged)):
                newest = there[max(there)]
                best, old = choose(self.folder, max(there), self.history, **self._kept)
                self._retire(newest, there.get(best), [name for name in old if name != newest.name])

        retire = as_checkpoint_error(choose_again, self.folder, CHECK_STORAGE)
        without_time_limit(self.groups.world, retire, Meter("removing old checkpoints"))

    def _start(self, part: Job) -> None:
        """Start a part in a thread. If saves are synchronous, :meth:`_next` runs the part instead."""
        self._running = Future()
        self._work = partial(self._settle, self._running, part)
        if self.asynchronous:
            # A daemon thread does not delay this process's exit if another rank dies. The next start removes the
            # unfinished files of the thread.
            threading.Thread(target=self._work, name="checkpoint", daemon=True).start()

    def _settle(self, future: Future, part: Job) -> None:
        started = time.perf_counter()
        try:
            found, settle = part(), future.set_result
        except BaseException as error:
            found, settle = error, future.set_exception
        self._spent_s += time.perf_counter() - started
        settle(found)

    def _next(self) -> None:
        """Wait until every rank has finished the current part, and start the next one."""
        running, self._running = self._running, None

        def result() -> Any:
            if not self.asynchronous:
                self._work()
            return running.result()

        try:
            part = self._parts.send(without_time_limit(self.groups.world, result, self._meter))
        except StopIteration as completed:
            self.took_s = self._spent_s
            self.saved(completed.value)
            return
        except Exception as error:
            part = self._parts.throw(error)
        self._start(part)

    def _in_parts(
        self, manifest: dict[str, Any], updates: int, tensors: dict[str, Tensor], length: int
    ) -> Generator[Job, Any, Path]:
        """Run a save as a generator: yield each part that this rank must run, and receive the result of this part.

        Returns the directory of the completed checkpoint.
        """
        step, world = manifest["step"], self.groups.world
        work = directories.working_directory(self.folder, step, self._run_id)
        unsaved = f"step {step} was not saved, but earlier checkpoints are intact; {CHECK_STORAGE}"

        def guarded(part: Job) -> Job:
            return unless_taken_over(as_checkpoint_error(part, work, unsaved), self.confirm)

        try:
            files = yield guarded(partial(self._write, work, tensors, length))
            said: list[Any] = [None] * world.size()
            dist.all_gather_object(said, (files, updates, self._spent_s), group=world)
            manifest["updates"] = max(made for _, made, _ in said)
            manifest["files"] = {name: facts for written, *_ in said for name, facts in written.items()}
            self._spent_s = max(spent for *_, spent in said)
            published = yield guarded(partial(self._publish, work, manifest))
        except Exception:
            if self._first:
                directories.discard(work)
            raise
        dist.broadcast_object_list(sent := [published], group=world, group_src=0)
        retire = partial(self._retire, *sent[0])
        yield as_checkpoint_error(retire, self.folder, f"step {step} was saved; {CHECK_STORAGE}")
        return sent[0][0]

    def _write(self, work: Path, tensors: dict[str, Tensor], length: int) -> dict[str, dict[str, Any]]:
        """Write this rank's shard and, on rank 0, the copy of metrics.jsonl. Return the files' sizes and hashes."""
        reach("save-begin", work)
        self.confirm()
        make_directory(work)
        shard = work / directories.shard_name(self.groups.world.rank())
        files = {shard.name: write_shard(shard, tensors, self._meter.add)}
        if self._first:
            files[HISTORY] = directories.copy_start(self.history, work / HISTORY, length)
        reach("save-shards", shard)
        return files

    def _publish(self, work: Path, manifest: dict[str, Any]) -> tuple[Path | None, Path | None, list[str]]:
        """On rank 0, complete the checkpoint.

        Returns the checkpoint's directory, the best checkpoint's directory (None if none is chosen), and the names of
        the checkpoints to remove; on the other ranks, None, None and an empty list.
        """
        final, best, old = None, None, []
        if self._first:
            chosen, old = choose(self.folder, manifest["step"], work / HISTORY, **self._kept)
            directories.seal(work, manifest)
        reach("save-manifest", work / MANIFEST)
        if self._first:
            self.confirm()
            final = directories.publish(work)
            best = None if chosen is None else directories.intact(self.folder, self.damaged)[chosen]
        return final, best, old

    def _retire(self, final: Path, best: Path | None, old: list[str]) -> None:
        """On rank 0, point `latest` and `best` to the newest and the best checkpoint, and remove old ones."""
        reach("save-rename", final)
        if self._first:
            self.confirm()
            directories.point(self.folder, final, best)
        reach("save-pointer", final)
        for path in directories.remove(self.folder, old, self._run_id) if self._first else old:
            reach("retention", path)

    def _history_length(self) -> int:
        """Return the size of metrics.jsonl in bytes on rank 0, and 0 on the other ranks."""
        return self.history.stat().st_size if self._first and self.history.exists() else 0

    def _state(self) -> dict[str, Tensor]:
        """Return the flat tensors that this rank saves, by key. Trained weights and moments are views, not copies."""
        groups, trained = self.groups, self.trained
        rank = groups.world.rank()
        tensors = {f"random|{name}|{rank}|0": state for name, state in random_state().items()}
        # Without the distributed optimizer, all copies of a parameter have the same state, so only the first is saved.
        # With the distributed optimizer, all its instances have the same state, so only the first is saved.
        distributed = trained.chunks[0].ddp_config.use_distributed_optimizer
        for placed, owned in placed_slices(trained, self.arch, groups):
            if placed.written_here and (trained.instance if distributed else placed.copies.rank()) == 0:
                for kind, values in {"main": owned.main.detach().view(-1), **owned.moments()}.items():
                    tensors[f"{kind}|{placed.name}|{placed.shard}|{owned.start}"] = values
        for placed in frozen_parameters(trained, self.arch, groups):
            if placed.written_here and placed.copies.rank() == 0:
                tensors[f"main|{placed.name}|{placed.shard}|0"] = placed.parameter.detach().float().view(-1)
        for placed in placed_parameters(self.following, self.arch, groups):
            if placed.written_here and placed.copies.rank() == 0:
                tensors[f"reference|{placed.name}|{placed.shard}|0"] = exact(placed.parameter).detach().view(-1)
        return tensors
