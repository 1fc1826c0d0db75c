"""Load a Hugging Face checkpoint into a sharded model, in any layout."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from dpo_engine.errors import ConfigError, EngineError, NumbersError
from dpo_engine.model.architecture import Architecture, read_architecture
from dpo_engine.model.weights.files import CheckpointFiles, check_tensors
from dpo_engine.model.weights.table import Placed, pieces, placed_parameters, reports, table_names
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups


class Files(Protocol):
    """Files that contain tensors; see :class:`~dpo_engine.model.weights.files.CheckpointFiles`."""

    where: str
    file_of: Mapping[str, str]

    def slices(self, names: Sequence[str]) -> Sequence[Any]:
        """Return an object for each tensor in ``names``. Indexing it like a tensor returns the selected part."""
        ...


def load_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    directory: str | Path,
    *,
    groups: ParallelGroups,
    key: str = "model.path",
) -> None:
    """Load a Hugging Face checkpoint into this rank's model chunks, in the parameters' dtype.

    Rank 0 first checks all headers. Then each rank reads only its own slices, one parameter at a time. The rows that
    pad the vocabulary are set to zero.

    key   configuration key whose value is the directory, for error messages

    *Collectives* over world: a few all-gathers of objects; no tensors are sent. Reading has no time limit.
    Raises on all ranks: :class:`~dpo_engine.errors.ConfigError` if the checkpoint cannot be read, if its architecture
    differs from ``arch``, or if its tensors do not have the expected names and shapes;
    :class:`~dpo_engine.errors.NumbersError` if a value is not finite in the parameters' dtype;
    :class:`~dpo_engine.errors.EngineError` if a parameter has no matching rule, or if a tensor was not loaded.
    """

    meter = Meter(f"reading {key}")

    def check() -> None:
        differences = arch.differences(read_architecture(directory, key))
        if differences:
            raise ConfigError(
                f"{key}={directory}: must have the policy's architecture, but has {', '.join(differences)}; use a "
                "checkpoint with the same architecture"
            )
        check_tensors(CheckpointFiles(directory, key), arch)

    def fill() -> set[str]:
        files, used = CheckpointFiles(directory, key), set()
        every = [placed for placed in placed_parameters(chunks, arch, groups) if not placed.rule.adapter]
        meter.total = sum(placed.parameter.nbytes for placed in every)
        for placed in every:
            used |= fill_parameter(placed, files, arch)
            meter.add(placed.parameter.nbytes)
        return used

    without_time_limit(groups.world, check if groups.world.rank() == 0 else lambda: None, meter)
    used = without_time_limit(groups.world, fill, meter)
    everywhere: list[set[str] | None] = [None] * groups.world.size()
    dist.all_gather_object(everywhere, used if reports(groups) else set(), group=groups.world)
    unread = table_names(arch) - set().union(*everywhere)
    if unread:
        raise EngineError(f"{key}={directory}: tensor {min(unread)} was not loaded into any parameter of the model")


@torch.no_grad()
def fill_parameter(placed: Placed, files: Files, arch: Architecture) -> set[str]:
    """Fill one parameter with this rank's slices of the checkpoint. Return the names of the tensors that were read.

    Raises :class:`~dpo_engine.errors.NumbersError` if a value is not finite in the parameter's dtype.
    """
    parameter, rule, rank, tp = placed.parameter, placed.rule, placed.shards.rank(), placed.shards.size()
    names = [tensor.name for tensor in placed.tensors(arch)]
    slices = files.slices(names)
    filled = 0
    for tensor, taken, place in pieces(rule, arch, shard_rows=parameter.shape[0], rank=rank, tp=tp):
        own = slice(None)
        if rule.cut == 1:
            width = parameter.shape[1]
            own = slice(rank * width, (rank + 1) * width)
        if rule.transposed:
            rows = slices[tensor][own, taken].T
        elif rule.cut == 1:
            rows = slices[tensor][taken, own]
        else:
            rows = slices[tensor][taken]
        shard = parameter[place]
        shard.copy_(rows)
        if not shard.isfinite().all():
            raise NumbersError(
                f"{files.where}: {files.file_of[names[tensor]]}: tensor {names[tensor]} has values that are not finite "
                f"in {shard.dtype}; download the checkpoint again, or set another model.dtype"
            )
        filled = place.stop
    parameter[filled:].zero_()
    return set(names)


@torch.no_grad()
def weights_digest(arch: Architecture, directory: str | Path, *, groups: ParallelGroups, key: str) -> str:
    """Compute a digest of the model in ``directory``.

    The digest depends on the architecture and on all tensors in the weight table, but not on the path.

    key   configuration key whose value is the directory, for error messages

    *Collectives* over world: three all-gathers of objects. Each rank reads a part of the tensors, without a time limit.
    Raises :class:`~dpo_engine.errors.ConfigError` on every rank if the checkpoint cannot be read.
    """
    names = sorted(table_names(arch))
    meter = Meter(f"hashing the weights of {key}")

    def mine() -> dict[str, str]:
        files, found = CheckpointFiles(directory, key), {}
        part = names[groups.world.rank() :: groups.world.size()]
        sizes = files.sizes()
        meter.total = sum(sizes.get(name, 0) for name in part)
        for name in part:
            found[name] = files.digest(name)
            meter.add(sizes[name])
        return found

    shares: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(shares, without_time_limit(groups.world, mine, meter), group=groups.world)
    digests = {name: digest for share in shares for name, digest in share.items()}
    whole = hashlib.sha256(arch.digest.encode())
    for name in names:
        whole.update(digests[name].encode())
    return whole.hexdigest()[:32]
