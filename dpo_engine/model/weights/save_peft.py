"""Save the adapters of a sharded model as a PEFT adapter, in any parallel layout."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dpo_engine.errors import EngineError
from dpo_engine.model.adaptation import Adaptation, peft_tensors
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.export import CARD, GENERATION, Export, companions, sealed
from dpo_engine.model.weights.files import ADAPTER, ADAPTER_CONFIG
from dpo_engine.model.weights.peft import adapter_config
from dpo_engine.model.weights.shard_files import ShardWriter, Share
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups


def save_peft(
    tensors: Mapping[str, Tensor],
    adaptation: Adaptation,
    arch: Architecture,
    directory: str | Path,
    *,
    base: str,
    sources: tuple[Path, Path | None],
    groups: ParallelGroups,
    tokenizer: Path,
    card: Callable[[], str] | None = None,
) -> None:
    """Write a PEFT adapter; ``directory`` is published atomically.

    tensors    the complete tensors of this stage's adapters, from
               :func:`~dpo_engine.model.weights.adapter_weights.stage_adapters`
    base       name of the adapters' base model, to be written in ``adapter_config.json``
    sources    directories that the run reads (model.path and adapter.path); the export must not replace them
    tokenizer  directory of a whole export, from which the tokenizer files are copied
    card       function that returns the content of README.md; None: no README.md

    Each stage writes its tensors to its own files, and rank 0 joins the files, because PEFT reads a single file.

    *Collectives* over world: all-gathers of objects. Writing has no time limit.
    On failure, removes the partial export and raises :class:`~dpo_engine.errors.EngineError` on all ranks.
    """
    export, world = Export(directory), groups.world
    leader = world.rank() == 0
    meter = Meter(f"exporting to {directory}")
    shards = ShardWriter(export.staging, f"stage-{groups.pp.rank():05d}", max_bytes=5 << 30)

    def write() -> None:
        meter.total = sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            shards.add(name, tensor.contiguous())
        export.attempt(shards.finish)
        meter.done = shards.num_bytes

    def publish() -> None:
        written = [name for share in shares for name in share.files]
        if sorted(written) != sorted(peft_tensors(adaptation, arch)):
            raise EngineError("each tensor of the adapters must be written exactly once, by a single stage")
        files: dict[str, bytes | Path] = {**companions(tokenizer, None)}
        files.pop(GENERATION, None)
        files[ADAPTER_CONFIG] = adapter_config(adaptation, arch, base).encode()
        if card is not None:
            files[CARD] = sealed(card()).encode()
        export.publish_single([share for share in shares if share.files], ADAPTER, files)

    try:
        prepare: Callable[[], Any] = lambda: export.attempt(lambda: export.open(*sources))  # noqa: E731
        without_time_limit(world, prepare if leader else lambda: None, meter)
        without_time_limit(world, write, meter)
        shares: list[Share] = [Share({}, 0)] * world.size()
        dist.all_gather_object(shares, Share(shards.files, shards.num_bytes), group=world)
        without_time_limit(world, (lambda: export.attempt(publish)) if leader else lambda: None, meter)
    except EngineError:
        if leader:
            export.discard()
        raise
