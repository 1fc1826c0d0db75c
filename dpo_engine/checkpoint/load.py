"""Find the newest intact checkpoint, which is the same on all ranks, and load it into any parallel layout."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from dpo_engine.checkpoint import directory as directories
from dpo_engine.checkpoint.directory import HISTORY, Damaged
from dpo_engine.checkpoint.shards import Pieces
from dpo_engine.errors import CheckpointError
from dpo_engine.faults import reach
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.table import Placed, placed_parameters
from dpo_engine.optim.optimizer import Trained
from dpo_engine.optim.state import OwnedSlice, after_load, owned_slices, set_adam_step
from dpo_engine.platform.long_work import Meter, from_first, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.platform.random_state import set_random_state
from dpo_engine.scoring.reference import set_exact


class Checkpoint(NamedTuple):
    """A checkpoint that all ranks have verified.

    step         number of optimizer steps done when the checkpoint was saved
    manifest     contents of its manifest file; the entries ``identity`` and ``run`` were written by the trainer
    passed_over  names of newer checkpoint directories that were skipped because they are damaged
    """

    step: int
    directory: Path
    manifest: dict[str, Any]
    passed_over: tuple[str, ...] = ()


def find_checkpoint(
    folder: Path,
    world: dist.ProcessGroup,
    *,
    step: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Checkpoint | None:
    """Return the newest intact checkpoint in ``folder``, or the checkpoint for ``step`` if given.

    Return ``None`` if ``step`` is not given and the folder has no checkpoints.

    say   if a checkpoint is returned, called on every rank with one line for each skipped checkpoint. If the directory
          of the returned checkpoint contains files that are not part of the checkpoint, also called with one line about
          these files

    *Collectives*: two all-gathers of objects and a broadcast of an object from rank 0. Then, for each checkpoint
    examined, three all-gathers of objects. Each rank verifies the hashes of a share of the files, without a time limit.
    Raises :class:`~dpo_engine.errors.CheckpointError` on every rank when the folder cannot be read, when there are
    checkpoints but none is intact, when a checkpoint has a format version that the engine does not read, when the ranks
    do not see the same files, or when there is no checkpoint for ``step``.
    """
    listing = from_first(
        world, as_checkpoint_error(partial(directories.committed, folder), folder), Meter(f"reading {folder}")
    )
    known = [path for path in listing if step in (None, directories.step_of(path))]
    if step is not None and not known:
        there = ", ".join(str(number) for number in sorted({directories.step_of(path) for path in listing}))
        raise CheckpointError(f"{folder}: contains no checkpoint for step {step}; available steps: {there or 'none'}")
    damaged: list[str] = []
    for index, directory in enumerate(reversed(known)):
        try:
            manifest, strangers = _agreed(directory, world)
        except Damaged as error:
            damaged.append(f"checkpoint for step {directories.step_of(directory)} skipped: {error.problems[0]}")
            continue
        for line in damaged:
            say(line)
        if strangers:
            say(f"{directory}: ignoring files that are not part of this checkpoint: {', '.join(strangers)}")
        passed_over = tuple(path.name for path in known[len(known) - index :])
        return Checkpoint(manifest["step"], directory, manifest, passed_over)
    if not damaged:
        return None
    if step is not None:
        raise CheckpointError([*damaged, f"{folder}: the checkpoint for step {step} is damaged; choose another step"])
    way_out = "restore a checkpoint, or remove all checkpoints to start from step 0"
    raise CheckpointError([*damaged, f"{folder}: no checkpoint is intact; {way_out}"])


def _agreed(directory: Path, world: dist.ProcessGroup) -> tuple[dict[str, Any], list[str]]:
    """Verify a checkpoint on all ranks. Return its manifest, and the names of other files in its directory.

    If the check fails on some ranks, all ranks raise the error of the lowest of these ranks.
    """
    meter = Meter(f"verifying {directory.name}")
    manifest, strangers, problem, there = {}, [], None, False

    def look() -> None:
        nonlocal manifest, strangers, problem, there
        there = (directory / directories.MANIFEST).exists()
        try:
            manifest = directories.verify(directory, part=world.rank(), parts=world.size(), meter=meter)
            strangers = directories.strangers(directory, manifest)
        except CheckpointError as error:
            problem = error

    without_time_limit(world, as_checkpoint_error(look, directory), meter)
    said: list[Any] = [None] * world.size()
    dist.all_gather_object(said, (problem, directories.digest(manifest), there), group=world)
    if blind := [rank for rank, (*_, sees) in enumerate(said) if not sees]:
        if len(blind) < len(said):  # the checkpoint is not damaged, so do not fall back to an older one
            raise CheckpointError(
                f"{directory}: rank {blind[0]} cannot see this checkpoint; train.output_dir must be on storage shared "
                "by all nodes. If it is, restart the job: changes on shared storage can reach a node with a delay"
            )
    for error, *_ in said:
        if error is not None:
            raise error
    if len({digest for _, digest, _ in said}) > 1:
        raise CheckpointError(
            f"{directory}: ranks read different manifests; train.output_dir must be on storage shared by all nodes"
        )
    return manifest, strangers


def load_checkpoint(
    found: Checkpoint,
    trained: Trained,
    arch: Architecture,
    groups: ParallelGroups,
    *,
    following: Sequence[torch.nn.Module] = (),
    random: bool = True,
) -> None:
    """Load a checkpoint's state into ``trained``. The checkpoint can be from any parallel layout.

    following  model chunks, or values of adapters, of a reference that is periodically updated from the policy
               (``reference.sync_every``); they are loaded, too
    random     whether to restore the states of the random number generators; ignored if the checkpoint was saved in a
               different layout, because its states then do not fit

    *Collectives*: an all-gather of objects over all ranks before the tensors are read, and another after they are read;
    reading has no time limit. Then the collectives of :func:`~dpo_engine.optim.state.after_load`.
    Raises :class:`~dpo_engine.errors.CheckpointError` on every rank when tensors are missing or do not fit the model.
    """
    manifest, directory = found.manifest, found.directory
    meter = Meter(f"reading {directory.name}")

    def fill() -> dict[str, Tensor]:
        reach("load", directory)
        shards = [name for name in manifest["files"] if name != HISTORY]
        layout = manifest["layout"]
        pieces = Pieces(directory, shards, source_tp=layout["tp"], source_etp=layout.get("etp", layout["tp"]))
        targets = [
            (kind, placed, owned, target)
            for placed, owned in placed_slices(trained, arch, groups)
            for kind, target in {"main": owned.main.detach().view(-1), **owned.moments()}.items()
        ]
        meter.total = sum(target.nbytes for *_, target in targets)
        for kind, placed, owned, target in targets:
            target.copy_(pieces.elements(kind, placed, owned.start, owned.stop))
            meter.add(target.nbytes)
        for placed in frozen_parameters(trained, arch, groups):
            count, shape = placed.parameter.numel(), placed.parameter.shape
            value = pieces.elements("main", placed, 0, count).view(shape)
            placed.parameter.detach().copy_(value)
        for placed in placed_parameters(following, arch, groups):
            count, shape = placed.parameter.numel(), placed.parameter.shape
            value = pieces.elements("reference", placed, 0, count).view(shape)
            set_exact(placed.parameter, value.to(placed.parameter.device))
        return pieces.random(groups.world.rank()) if same_layout(layout, groups) else {}

    generators = without_time_limit(groups.world, as_checkpoint_error(fill, directory), meter)
    set_adam_step(trained, manifest["updates"])
    after_load(trained)
    trained.schedule.num_steps = manifest["schedule"]
    trained.schedule.step(0)
    if random and generators:
        set_random_state(generators)


def same_layout(saved: dict[str, Any], groups: ParallelGroups) -> bool:
    """Whether a checkpoint was saved in this layout.

    Checkpoints of versions that did not support experts lack ``etp``. Checkpoints of versions that did not support
    uneven stages lack ``layers``.
    """
    now = json.loads(json.dumps(asdict(groups.dims)))  # a manifest has lists instead of tuples
    return {"etp": saved["tp"], "layers": None, **saved} == now


def placed_slices(trained: Trained, arch: Architecture, groups: ParallelGroups) -> Iterator[tuple[Placed, OwnedSlice]]:
    """Yield each slice that this rank's optimizer owns, with the placement of its parameter."""
    chunks = [chunk.module for chunk in trained.chunks]
    places = {placed.parameter: placed for placed in placed_parameters(chunks, arch, groups)}
    for owned in owned_slices(trained):
        yield places[owned.parameter], owned


def frozen_parameters(trained: Trained, arch: Architecture, groups: ParallelGroups) -> list[Placed]:
    """Return those frozen parameters of this rank that checkpoints contain.

    These are the weights that ``optim.freeze`` and ``train.freeze_router`` freeze, and the biases that routers add to
    the scores of experts when they choose experts. With adapters, return an empty list. The frozen weights are then the
    weights at ``model.path``, and checkpoints contain only the digest of these weights.
    """
    if trained.chunks[0].module.adapted:
        return []
    chunks = [chunk.module for chunk in trained.chunks]
    return [placed for placed in placed_parameters(chunks, arch, groups) if not placed.parameter.requires_grad]


def as_checkpoint_error(work: Callable[[], Any], place: Path, ending: str = "") -> Callable[[], Any]:
    """Wrap ``work`` so that file errors become a one-line :class:`CheckpointError`.

    File errors are errors in reading or writing a file, and errors in the contents of a file.

    place   path that the line names if the error itself names no file
    ending  text added to the end of the line
    """
    ending = ending and f"; {ending}"

    def run() -> Any:
        try:
            return work()
        except OSError as error:
            raise CheckpointError(f"{error.filename or place}: {error.strerror or error}{ending}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{place}: {error}{ending}") from error
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"{place}: {error.args[0] if error.args else error}{ending}") from error

    return run


def unless_taken_over(work: Callable[[], Any], confirm: Callable[[], None]) -> Callable[[], Any]:
    """Wrap ``work`` so that, if it fails because another run has taken over, the error of ``confirm`` is raised.

    A run that has taken over removes the files of this run. The error of ``work`` would therefore name a missing file
    and not the cause.
    """

    def run() -> Any:
        try:
            return work()
        except CheckpointError:
            with suppress(OSError):
                try:
                    confirm()
                except CheckpointError as reason:
                    if reason.__cause__ is None:  # otherwise, `confirm` failed because of the storage
                        raise
            raise

    return run
