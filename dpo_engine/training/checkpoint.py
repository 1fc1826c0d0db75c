"""Save, load, resume: fp32 weights and Adam moments in safetensors shards, readable in any layout.

A checkpoint is a directory ``step_<n>``: one shard per writing rank and ``manifest.json``, which names every shard with
its size and SHA-256. A shard's keys say what its flat tensors are: ``kind|parameter|tensor-parallel rank|first one``.
There is no pickle in it. A directory becomes a checkpoint by one rename, after everything in it is on disk.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_engine.durable import sync
from dpo_engine.errors import CheckpointError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.families.blocks import Rule
from dpo_engine.model.weights import Placed, placed_parameters
from dpo_engine.platform.parallel import ParallelGroups, together
from dpo_engine.scoring.reference import exact, set_exact
from dpo_engine.training.identity import compare
from dpo_engine.training.optimizer import Trained
from dpo_engine.training.optimizer_state import OwnedSlice, after_load, owned_slices, set_adam_step

FORMAT = 1
MANIFEST = "manifest.json"
STEP = re.compile(r"step_(\d{8})")


def step_directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies or will lie."""
    return folder / f"step_{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps that have a complete checkpoint in ``folder``, ascending."""
    found = (STEP.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(match[1]) for match in found if match and (folder / match[0] / MANIFEST).is_file())


def latest_step(folder: Path) -> int | None:
    """The newest complete checkpoint's step, or ``None``."""
    return max(steps(folder), default=None)


def _named(chunks: Sequence[torch.nn.Module], arch: Architecture, groups: ParallelGroups) -> list[tuple[str, Placed]]:
    """This rank's parameters by their layout-independent names."""
    placed = placed_parameters(chunks, arch, tp=groups.tp.size()) if chunks else ()
    return [(one.rule.parameter.format(l=one.layer), one) for one in placed]


def placed_slices(trained: Trained, arch: Architecture, *, tp: int) -> Iterator[tuple[str, Placed, OwnedSlice]]:
    """Each slice this rank's optimizer owns, with its parameter's layout-independent name and its place."""
    chunks = [chunk.module for chunk in trained.chunks]
    places = {placed.parameter: placed for placed in placed_parameters(chunks, arch, tp=tp)}
    for owned in owned_slices(trained):
        placed = places[owned.parameter]
        yield placed.rule.parameter.format(l=placed.layer), placed, owned


def save_checkpoint(
    folder: Path,
    step: int,
    trained: Trained,
    arch: Architecture,
    groups: ParallelGroups,
    identity: dict[str, Any],
    *,
    keep_last: int,
    following: Sequence[torch.nn.Module] = (),
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state after ``step`` optimiser steps, then drop all but the newest ``keep_last`` checkpoints.

    identity   facts that a resuming run must share, stored in the manifest
    following  chunks of a reference that follows the policy: its weights are part of the state
    run        what is recorded of the run beside that

    *Collectives*: two gathers of objects over all ranks; nobody goes on before the checkpoint is complete.
    Raises :class:`~dpo_engine.errors.CheckpointError` on every rank when one cannot write.
    """
    final, work = step_directory(folder, step), folder / f"step_{step:08d}.tmp"
    first = groups.world.rank() == 0

    def prepare() -> None:
        if first:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)

    together(groups.world, _as_checkpoint_error(prepare, work))
    shard = together(
        groups.world, _as_checkpoint_error(lambda: _write_shard(work, trained, arch, groups, following), work)
    )
    shards: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(shards, shard, group=groups.world)

    def commit() -> None:
        if not first:
            return
        manifest = {
            "format": FORMAT,
            "step": step,
            "tp": groups.dims.tp,
            "identity": identity,
            "run": dict(run or {}),
            "files": {name: facts for name, facts in filter(None, shards)},
        }
        _write_json(work / MANIFEST, manifest)
        sync(work)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        sync(folder)
        for old in steps(folder)[:-keep_last]:
            shutil.rmtree(step_directory(folder, old))

    together(groups.world, _as_checkpoint_error(commit, final))
    return final


def _write_shard(
    work: Path,
    trained: Trained,
    arch: Architecture,
    groups: ParallelGroups,
    following: Sequence[torch.nn.Module],
) -> tuple[str, dict[str, Any]] | None:
    """Write what this rank owns; returns the file's name, size and hash, or ``None`` when others write the same."""
    distributed = trained.chunks[0].ddp_config.use_distributed_optimizer
    if not distributed and groups.dp_cp.rank() != 0:
        return None
    tensors = {}
    for name, placed, owned in placed_slices(trained, arch, tp=groups.tp.size()):
        if placed.copy or (placed.rule.cut is None and groups.tp.rank() != 0):
            continue
        for kind, values in {"main": owned.main.detach().view(-1), **owned.moments()}.items():
            tensors[f"{kind}|{name}|{groups.tp.rank()}|{owned.start}"] = values.cpu().contiguous()
    if groups.dp_cp.rank() == 0:
        for name, placed in _named(following, arch, groups):
            if not placed.copy and (placed.rule.cut is not None or groups.tp.rank() == 0):
                values = exact(placed.parameter).detach().reshape(-1).cpu()
                tensors[f"reference|{name}|{groups.tp.rank()}|0"] = values
    name = f"rank_{groups.world.rank():05d}.safetensors"
    save_file(tensors, work / name)
    sync(work / name)
    return name, {"size": (work / name).stat().st_size, "sha256": _sha256(work / name)}


def load_checkpoint(
    folder: Path,
    step: int,
    trained: Trained,
    arch: Architecture,
    groups: ParallelGroups,
    identity: dict[str, Any],
    *,
    accepted: Sequence[str] = (),
    following: Sequence[torch.nn.Module] = (),
) -> int:
    """Put the state of ``step`` into ``trained``, whatever layout wrote it; returns the step.

    identity   facts that the manifest must agree with; what it says beyond them is not looked at
    accepted   keys of them that may differ
    following  chunks of a reference that follows the policy, which get its weights of that step

    *Collectives*: verdicts over all ranks before and after the tensors are read; a parameter all-gather over dp_cp.
    Raises :class:`~dpo_engine.errors.CheckpointError` on every rank for a damaged, missing or foreign checkpoint.
    """
    directory = step_directory(folder, step)

    def verify() -> dict[str, Any]:
        manifest = read_manifest(folder, step, identity, accepted)
        for index, (name, facts) in enumerate(sorted(manifest["files"].items())):
            if index % groups.world.size() == groups.world.rank():
                _verify_file(directory / name, facts)
        return manifest

    manifest = together(groups.world, _as_checkpoint_error(verify, directory))

    def fill() -> None:
        pieces = Pieces(directory, list(manifest["files"]), source_tp=manifest["tp"])
        tp_rank, tp = groups.tp.rank(), groups.tp.size()
        for name, placed, owned in placed_slices(trained, arch, tp=tp):
            for kind, target in {"main": owned.main.detach().view(-1), **owned.moments()}.items():
                target.copy_(pieces.elements(kind, name, placed, owned.start, owned.stop, tp_rank, tp))
        for name, placed in _named(following, arch, groups):
            count, shape = placed.parameter.numel(), placed.parameter.shape
            value = pieces.elements("reference", name, placed, 0, count, tp_rank, tp).view(shape)
            set_exact(placed.parameter, value.to(placed.parameter.device))

    together(groups.world, _as_checkpoint_error(fill, directory))
    set_adam_step(trained, step)
    after_load(trained)
    trained.schedule.num_steps = step
    trained.schedule.step(0)
    return step


class Piece(NamedTuple):
    """A stored run of elements of one rank's flattened shard, from ``start`` on."""

    start: int
    stop: int
    file: str
    key: str


class Pieces:
    """All stored tensors of a checkpoint, found by kind, parameter and the tensor-parallel rank that wrote them."""

    def __init__(self, directory: Path, files: list[str], *, source_tp: int):
        self.source_tp = source_tp
        self.files = {name: safe_open(directory / name, "pt") for name in files}
        self.found: dict[tuple[str, str, int], list[Piece]] = defaultdict(list)
        for name, file in self.files.items():
            for key in file.keys():
                kind, parameter, tp_rank, start = key.split("|")
                length = file.get_slice(key).get_shape()[0]
                piece = Piece(int(start), int(start) + length, name, key)
                self.found[kind, parameter, int(tp_rank)].append(piece)

    def flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened shard that ``tp_rank`` wrote; fp32.

        Raises ``KeyError`` naming the parameter when some are missing.
        """
        out = torch.empty(stop - start, dtype=torch.float32)
        filled = 0
        for piece in self.found.get((kind, name, tp_rank), ()):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                part = self.files[piece.file].get_slice(piece.key)[low - piece.start : high - piece.start]
                out[low - start : high - start] = part
                filled += high - low
        if filled != stop - start:
            raise KeyError(f"{kind} of {name}: {stop - start - filled} of {stop - start} elements are missing")
        return out

    def size(self, kind: str, name: str, tp_rank: int) -> int:
        """Elements of the shard that ``tp_rank`` wrote."""
        return max((piece.stop for piece in self.found.get((kind, name, tp_rank), ())), default=0)

    def elements(self, kind: str, name: str, placed: Placed, start: int, stop: int, tp_rank: int, tp: int) -> Tensor:
        """Elements of a flattened parameter in the layout of this run, wherever they lie in the one that wrote them."""
        rule = placed.rule
        if rule.cut is None or tp == self.source_tp:
            return self.flat(kind, name, 0 if rule.cut is None else tp_rank, start, stop)
        local = tuple(placed.parameter.shape)
        return self._reshard(kind, name, rule, local, tp_rank, tp).view(-1)[start:stop]

    def _reshard(self, kind: str, name: str, rule: Rule, local: tuple[int, ...], tp_rank: int, tp: int) -> Tensor:
        """This rank's shard, of shape ``local``, cut from the whole parameter."""
        shards = []
        for source in range(self.source_tp):
            count = self.size(kind, name, source)
            if count == 0:
                raise KeyError(f"{kind} of {name}: missing")
            width = local[1] * tp // self.source_tp if rule.cut == 1 else (local[1] if len(local) > 1 else 1)
            shape = (count // width, *((width,) if len(local) > 1 else ()))
            shards.append(self.flat(kind, name, source, 0, count).view(shape))
        return cut_shard(join_shards(shards, rule), rule, local, tp_rank, tp)


def join_shards(shards: list[Tensor], rule: Rule) -> Tensor:
    """The whole parameter from every tensor-parallel rank's shard; a gated projection's gate rows come first."""
    if rule.layout == "glu":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, rule.cut)


def cut_shard(whole: Tensor, rule: Rule, local: tuple[int, ...], tp_rank: int, tp: int) -> Tensor:
    """Rank ``tp_rank``'s shard, of shape ``local``, of a parameter from :func:`join_shards`.

    A padded vocabulary may have another number of rows in another layout: missing padding rows are zero.
    """
    if rule.layout == "glu":
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp)[tp_rank], up.chunk(tp)[tp_rank]])
    if rule.layout == "vocab" and whole.shape[0] != local[0] * tp:
        rows = whole.new_zeros((local[0] * tp, *whole.shape[1:]))
        common = min(rows.shape[0], whole.shape[0])
        rows[:common] = whole[:common]
        whole = rows
    return whole.chunk(tp, rule.cut)[tp_rank].contiguous()


def _as_checkpoint_error(work: Any, directory: Path) -> Any:
    """``work`` with file and format errors as one line about ``directory``."""

    def run() -> Any:
        try:
            return work()
        except OSError as error:
            raise CheckpointError(f"{error.filename or directory}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error.args[0] if error.args else error}") from error

    return run


def read_manifest(folder: Path, step: int, identity: dict[str, Any], accepted: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of ``step``, which must agree with ``identity`` but for the keys ``accepted``.

    Raises :class:`~dpo_engine.errors.CheckpointError` for a damaged one, one of another format, or another run's.
    """
    directory = step_directory(folder, step)
    path = directory / MANIFEST
    if not path.is_file():
        there = ", ".join(map(str, steps(folder))) or "none"
        raise CheckpointError(f"{folder}: holds no checkpoint of step {step}; its steps are {there}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); remove {directory.name} to fall back to an older one"
        ) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')}; this version reads {FORMAT}, use the version that wrote it"
        )
    compare(manifest["identity"], identity, accepted, where=directory)
    return manifest


def _verify_file(path: Path, facts: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != facts["size"]:
        raise CheckpointError(f"{path}: {size} bytes, must be {facts['size']}; the file is cut or replaced")
    if _sha256(path) != facts["sha256"]:
        raise CheckpointError(f"{path}: SHA-256 differs from the manifest's; the file is damaged")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    sync(path)
