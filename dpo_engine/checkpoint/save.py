"""Save a run's whole state after a step: copied at once, written while the run goes on, complete by one rename.

A save has three parts, and no rank begins one before all have ended the one before: each rank writes its shard; the
first one writes the manifest and gives the directory its name; `latest` follows and old checkpoints go. There is no
pickle in a checkpoint: its tensors are safetensors, the rest is JSON.
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

from dpo_engine.atomic_files import HashedFile, make_directory
from dpo_engine.checkpoint import directory as directories
from dpo_engine.checkpoint.directory import FORMAT, HISTORY, MANIFEST
from dpo_engine.checkpoint.load import as_checkpoint_error, named_parameters, placed_slices
from dpo_engine.checkpoint.shards import BLOCK, write_shard
from dpo_engine.faults import reach
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.table import Placed
from dpo_engine.optim.optimizer import Trained
from dpo_engine.optim.state import adam_step, set_adam_step
from dpo_engine.platform.parallel import ParallelGroups, together
from dpo_engine.platform.random_state import random_state
from dpo_engine.scoring.reference import exact

Job = Callable[[], Any]


class Saver:
    """Writes the checkpoints of a run, one after the other.

    identity      facts that a resuming run must share
    keep_last     newest checkpoints kept, at least 2
    asynchronous  a save costs the run a copy of this rank's state to host memory; a thread writes it during later steps
    history       the run's metrics.jsonl
    following     chunks of a reference that follows the policy: its weights are part of the state
    passed_over   names of directories that are known to be damaged

    *Collectives*, to construct one: one object from rank 0.
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
        asynchronous: bool,
        device: torch.device,
        history: Path,
        following: Sequence[torch.nn.Module] = (),
        passed_over: Sequence[str] = (),
    ):
        self.folder = folder
        self.trained, self.arch, self.groups = trained, arch, groups
        self.identity = identity
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.history = history
        self.following = following
        self.damaged = set(passed_over)
        self.took_s = 0.0  # of the latest complete save: the work of the slowest rank
        self._spent_s = 0.0  # on the save in flight, so far
        self._first = groups.world.rank() == 0
        self._flag = torch.zeros((), dtype=torch.int64, device=device)
        self._host: dict[str, Tensor] = {}
        self._parts: Generator[Job, Any, None] | None = None  # of the save in flight
        self._running: Future | None = None  # the part that it is at
        run_id = [secrets.token_hex(4)]
        dist.broadcast_object_list(run_id, group=groups.world, group_src=0)
        self._run_id = run_id[0]

    def save(self, step: int, run: dict[str, Any]) -> None:
        """Save the state after ``step`` optimiser steps, with ``run``, anything that JSON can say, in its manifest.

        Returns when the state may change again. Asynchronously the checkpoint is complete once :meth:`advance` or
        :meth:`finish` has seen to it; a save that is still in flight is finished first.

        *Collectives*, Raises: as :meth:`finish`.
        """
        self.finish()
        started = time.perf_counter()
        updates = adam_step(self.trained)
        tensors = self._state()
        if updates == 0:
            set_adam_step(self.trained, 0)  # torch's AdamW looks for it where there are moments, and now there are
        if self.asynchronous:
            tensors = self._on_host(tensors)
        # Later steps add to the history while it is copied.
        length = self.history.stat().st_size if self._first and self.history.exists() else 0
        manifest = {
            "format": FORMAT,
            "step": step,
            "schedule": self.trained.schedule.num_steps,
            "layout": asdict(self.groups.dims),
            "identity": self.identity,
            "run": run,
        }
        self._spent_s = time.perf_counter() - started
        self._parts = self._in_parts(manifest, updates, tensors, length)
        self._start(next(self._parts))
        if not self.asynchronous:
            self.finish()

    @property
    def in_flight(self) -> bool:
        """Whether a save is not complete yet."""
        return self._running is not None

    def advance(self) -> None:
        """Between two steps: take the save in flight further if every rank has done its part of it.

        *Collectives* over all ranks while a save is in flight: one MIN of a number; those of :meth:`finish` when it
        goes on.
        """
        if self._running is None:
            return
        self._flag.fill_(int(self._running.done()))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MIN, group=self.groups.world)
        if int(self._flag):
            self._next()

    def finish(self) -> None:
        """Wait until the save in flight is complete.

        *Collectives*: a few gathers of objects over all ranks.
        Raises :class:`~dpo_engine.errors.CheckpointError` on every rank when one cannot write; what it had written is
        gone then, and earlier checkpoints are as they were.
        """
        while self._running is not None:
            self._next()

    def _start(self, part: Job) -> None:
        self._running = Future()
        work = partial(self._settle, self._running, part)
        if self.asynchronous:
            # A daemon: a process whose peers are gone leaves at once, and the next start removes what it was writing.
            threading.Thread(target=work, name="checkpoint", daemon=True).start()
        else:
            work()

    def _settle(self, future: Future, part: Job) -> None:
        started = time.perf_counter()
        try:
            found, failure = part(), None
        except BaseException as error:
            found, failure = None, error
        self._spent_s += time.perf_counter() - started
        if failure:
            future.set_exception(failure)
        else:
            future.set_result(found)

    def _next(self) -> None:
        """Wait for every rank's part, and start the next one."""
        running, self._running = self._running, None
        try:
            part = self._parts.send(together(self.groups.world, running.result))
        except StopIteration:
            self.took_s = self._spent_s
            return
        except Exception as error:
            part = self._parts.throw(error)
        self._start(part)

    def _in_parts(
        self, manifest: dict[str, Any], updates: int, tensors: dict[str, Tensor], length: int
    ) -> Generator[Job, Any, None]:
        """A save in its order: yields what each rank is to do next, and is sent what that gave on this one."""
        step, world = manifest["step"], self.groups.world
        work = directories.working_directory(self.folder, step, self._run_id)
        unsaved = f"step {step} is not saved, earlier checkpoints are whole: see to the storage and start again"
        saved = f"step {step} is saved: see to the storage and start again"
        try:
            files = yield as_checkpoint_error(partial(self._write, work, tensors, length), work, unsaved)
            said: list[Any] = [None] * world.size()
            dist.all_gather_object(said, (files, updates, self._spent_s), group=world)
            manifest["updates"] = max(made for _, made, _ in said)
            manifest["files"] = {name: facts for written, *_ in said for name, facts in written.items()}
            self._spent_s = max(spent for *_, spent in said)
            published = yield as_checkpoint_error(partial(self._publish, work, manifest), work, unsaved)
        except Exception:
            if self._first:
                directories.discard(work)
            raise
        sent = [published]
        dist.broadcast_object_list(sent, group=world, group_src=0)
        yield as_checkpoint_error(partial(self._retire, *sent[0]), self.folder, saved)

    def _write(self, work: Path, tensors: dict[str, Tensor], length: int) -> dict[str, dict[str, Any]]:
        """Write this rank's shard, and on the first one the history; returns the files' sizes and hashes."""
        reach("save-begin", work)
        make_directory(work)
        shard = work / directories.shard_name(self.groups.world.rank())
        files = {shard.name: write_shard(shard, tensors)}
        if self._first:
            files[HISTORY] = _copy(self.history, work / HISTORY, length)
        reach("save-shards", shard)
        return files

    def _publish(self, work: Path, manifest: dict[str, Any]) -> tuple[Path | None, list[str]]:
        """On the first rank, complete the checkpoint; returns its directory, and names of those that may go now."""
        final, old = None, []
        if self._first:
            old = directories.superseded(self.folder, manifest["step"], keep_last=self.keep_last, damaged=self.damaged)
            directories.seal(work, manifest)
        reach("save-manifest", work / MANIFEST)
        if self._first:
            final = directories.publish(work)
        return final, old

    def _retire(self, final: Path, old: list[str]) -> None:
        """On the first rank, have `latest` name the new checkpoint and remove old ones."""
        reach("save-rename", final)
        if self._first:
            directories.point(final)
        reach("save-pointer", final)
        for path in directories.remove(self.folder, old, self._run_id) if self._first else old:
            reach("retention", path)

    def _state(self) -> dict[str, Tensor]:
        """What this rank writes: flat tensors by their keys. Those of the model share memory with it."""
        groups, trained = self.groups, self.trained
        tp, rank = groups.tp.rank(), groups.world.rank()
        tensors = {f"random|{name}|{rank}|0": state for name, state in random_state().items()}
        # Without the distributed optimizer, data-parallel ranks all have the same.
        if trained.chunks[0].ddp_config.use_distributed_optimizer or groups.dp_cp.rank() == 0:
            for name, placed, owned in placed_slices(trained, self.arch, tp=groups.tp.size()):
                if _written_by(placed, tp):
                    for kind, values in {"main": owned.main.detach().view(-1), **owned.moments()}.items():
                        tensors[f"{kind}|{name}|{tp}|{owned.start}"] = values
        if groups.dp_cp.rank() == 0:
            for name, placed in named_parameters(self.following, self.arch, groups):
                if _written_by(placed, tp):
                    tensors[f"reference|{name}|{tp}|0"] = exact(placed.parameter).detach().view(-1)
        return tensors

    def _on_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors`` in host memory, which is kept for the next save."""
        for key, tensor in tensors.items():
            if key not in self._host or self._host[key].shape != tensor.shape:
                self._host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[key].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        return self._host


def _copy(source: Path, target: Path, length: int) -> dict[str, Any]:
    """Copy the first ``length`` bytes of a file; returns size and SHA-256 of the copy."""
    with HashedFile(target) as copy:
        if length:
            with open(source, "rb") as file:
                while block := file.read(min(BLOCK, length - copy.size)):
                    copy.write(block)
    return {"size": copy.size, "sha256": copy.digest.hexdigest()}


def _written_by(placed: Placed, tp_rank: int) -> bool:
    """Whether a tensor-parallel rank writes its part of a parameter: of what all of them have, the first does."""
    return not placed.copy and (placed.rule.cut is not None or tp_rank == 0)
