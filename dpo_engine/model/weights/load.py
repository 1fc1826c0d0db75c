"""Load a Hugging Face checkpoint into a sharded model, in any layout."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpo_engine.errors import ConfigError, EngineError, NumbersError
from dpo_engine.model.architecture import Architecture, read_architecture
from dpo_engine.model.weights.files import CheckpointFiles, check_tensors
from dpo_engine.model.weights.table import Placed, leads_stage, pieces, placed_parameters, table_names
from dpo_engine.platform.parallel import ParallelGroups, together


def load_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    directory: str | Path,
    *,
    groups: ParallelGroups,
    key: str = "model.path",
) -> None:
    """Fill this rank's model chunks from a Hugging Face checkpoint, in the parameters' own dtype.

    Rank 0 first reads every header; then each rank reads its own slices and nothing else, tensor by tensor. Rows that
    pad the vocabulary become zero.

    key   the configuration key that named the directory, for messages

    *Collectives* over world: three gathers of objects; no tensors travel.
    Raises :class:`~dpo_engine.errors.ConfigError`, on all ranks together, unless the checkpoint is of ``arch`` and its
    tensors and the model's parameters are the same set, in the shapes that ``arch`` gives them.
    """

    def check() -> None:
        differences = arch.differences(read_architecture(directory, key))
        if differences:
            raise ConfigError(
                f"{key}={directory}: has {', '.join(differences)}; it must be of the policy's architecture"
            )
        check_tensors(CheckpointFiles(directory, key), arch)

    def fill() -> set[str]:
        files, used = CheckpointFiles(directory, key), set()
        for placed in placed_parameters(chunks, arch, tp=groups.tp.size()):
            used |= _fill(placed, files, arch, rank=groups.tp.rank(), tp=groups.tp.size())
        return used

    together(groups.world, check if groups.world.rank() == 0 else lambda: None)
    used = together(groups.world, fill)
    everywhere: list[set[str] | None] = [None] * groups.world.size()
    dist.all_gather_object(everywhere, used if leads_stage(groups) else set(), group=groups.world)
    unread = table_names(arch) - set().union(*everywhere)
    if unread:
        raise EngineError(f"{key}={directory}: tensor {min(unread)} was read by no parameter of the model")


@torch.no_grad()
def _fill(placed: Placed, files: CheckpointFiles, arch: Architecture, *, rank: int, tp: int) -> set[str]:
    """Copy this rank's slices into one parameter; returns the names of the tensors it is made of."""
    parameter, rule, layer, _ = placed
    names = [tensor.name for tensor in rule.hf_tensors(arch, layer)]
    slices = files.slices(names)
    filled = 0
    for tensor, start, stop, at in pieces(rule, arch, shard_rows=parameter.shape[0], rank=rank, tp=tp):
        if rule.cut == 1:
            width = parameter.shape[1]
            rows = slices[tensor][start:stop, rank * width : (rank + 1) * width]
        else:
            rows = slices[tensor][start:stop]
        shard = parameter[at : at + stop - start]
        shard.copy_(rows)
        if not shard.isfinite().all():
            raise NumbersError(
                f"{files.where}: {files.file_of[names[tensor]]}: tensor {names[tensor]} has values that are not finite "
                f"in {shard.dtype}; fetch the checkpoint again, or set another model.dtype"
            )
        filled = at + stop - start
    parameter[filled:].zero_()
    return set(names)


@torch.no_grad()
def weights_digest(arch: Architecture, directory: str | Path, *, groups: ParallelGroups, key: str) -> str:
    """A name for the model in ``directory``: equal exactly when architecture and all tensors are, wherever they lie.

    key   the configuration key that named the directory, for messages

    *Collectives*: one gather of objects over all ranks, which share the reading.
    Raises :class:`~dpo_engine.errors.ConfigError` on every rank for a checkpoint that cannot be read.
    """
    names = sorted(table_names(arch))

    def mine() -> dict[str, str]:
        files = CheckpointFiles(directory, key)
        return {name: files.digest(name) for name in names[groups.world.rank() :: groups.world.size()]}

    shares: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(shares, together(groups.world, mine), group=groups.world)
    digests = {name: digest for share in shares for name, digest in share.items()}
    whole = hashlib.sha256(arch.digest.encode())
    for name in names:
        whole.update(digests[name].encode())
    return whole.hexdigest()[:32]
