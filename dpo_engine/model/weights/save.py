"""Save a sharded model as a Hugging Face checkpoint, whatever the parallel layout."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.data.hub import model_directory
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.errors import EngineError, NumbersError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.export import (
    CARD,
    GENERATION,
    Export,
    ShardWriter,
    Share,
    companions,
    config_text,
    sealed,
)
from dpo_engine.model.weights.files import CheckpointFiles
from dpo_engine.model.weights.table import Placed, pieces, placed_parameters, table_names
from dpo_engine.model.weights.tokenizer_files import AUTO, Files, exported_tokenizer
from dpo_engine.platform.parallel import ParallelGroups, together


def save_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    directory: str | Path,
    *,
    source: str | Path,
    groups: ParallelGroups,
    tokenizer: str | Path | None = None,
    trained_with: Tokenizer | None = None,
    card: Callable[[str], str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the model as a Hugging Face checkpoint; ``directory`` is published atomically.

    source        directory of the checkpoint that the run started from; its config.json, generation config and
                  tokenizer are copied
    tokenizer     directory, SentencePiece file or Hub id of the tokenizer; None if the tokenizer is in ``source``
    trained_with  the same tokenizer as the run read it, with its chat template; read on the first rank only. The
                  exported files are compared with it. None: they are copied without a comparison
    card          function that returns the content of README.md; its argument is the name of the transformers class
                  that reads the exported tokenizer. None: no README.md
    say           called on the first rank with a line for each property of the tokenizer that the export cannot keep
    dtype         dtype of all exported tensors. None: each tensor gets the dtype that it has in ``source``, whatever
                  dtype the run used, so fp32 parameters that were loaded from a bf16 checkpoint are rounded to bf16

    One rank of each pipeline stage gathers the stage's parameters over tp, one by one, and writes the stage's files.
    An existing directory is replaced only if an earlier export wrote it.

    *Collectives*: one gather per sharded parameter over tp (dp and cp rank 0 only); four gathers of objects over world.
    On failure, removes the partial export and raises :class:`~dpo_engine.errors.EngineError` on all ranks.
    """
    source, export = model_directory(source), Export(directory)
    tokenizer = tokenizer and model_directory(tokenizer, "model.tokenizer")
    leader = groups.world.rank() == 0

    def on_leader(work: Callable[[], None]) -> None:
        together(groups.world, (lambda: export.attempt(work)) if leader else lambda: None)

    def write() -> Share:
        shards = ShardWriter(export.staging, f"stage-{groups.pp.rank():05d}", max_shard_bytes)
        dtypes = _Dtypes(source, dtype)
        return _write_share(chunks, arch, shards, dtypes, export=export, groups=groups)

    def publish() -> None:
        files: Files = dict(companions(source, tokenizer))
        config, loader = config_text(source, dtype), AUTO
        if trained_with is not None:
            generation = {name: files.pop(name) for name in (GENERATION,) if name in files}
            files, loader, notes = exported_tokenizer(files, config, trained_with)
            files |= generation
            for note in notes:
                say(note)
        if card is not None:
            files[CARD] = sealed(card(loader)).encode()
        export.publish(_complete(shares, arch), {**files, "config.json": config.encode()})

    on_leader(lambda: export.open(source))
    try:
        share = together(groups.world, write)
        shares: list[Share] = [share] * groups.world.size()
        dist.all_gather_object(shares, share, group=groups.world)
        on_leader(publish)
    except EngineError:
        if leader:
            export.discard()
        raise


class _Dtypes:
    """Maps each tensor to the dtype of its export: the requested dtype, or else its dtype in the source checkpoint."""

    def __init__(self, source: Path, asked: torch.dtype | None):
        self.source = source
        self.asked = asked
        self._files: CheckpointFiles | None = None

    def __getitem__(self, name: str) -> torch.dtype:
        if self.asked is not None:
            return self.asked
        self._files = self._files or CheckpointFiles(self.source)
        return self._files.dtype(name)


def _write_share(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    shards: ShardWriter,
    dtypes: _Dtypes,
    *,
    export: Export,
    groups: ParallelGroups,
) -> Share:
    """Write this stage's tensors to shard files, one at a time. One rank per stage writes.

    *Collectives* over tp, on ranks whose dp and cp ranks are 0: one gather per sharded parameter. After an error, the
    remaining gathers still run, because the other ranks of the group take part in them; the error is raised at the end.
    """
    if groups.dp_cp.rank() != 0:
        return Share({}, 0)
    failure = None
    for placed in placed_parameters(chunks, arch, tp=groups.tp.size()):
        if placed.copy:
            continue
        parts = _gather(placed.parameter, groups.tp) if placed.rule.cut is not None else [placed.parameter.detach()]
        if groups.tp.rank() != 0 or failure is not None:
            continue
        try:
            export.attempt(lambda placed=placed, parts=parts: _add(shards, _assemble(placed, parts, arch, dtypes)))
        except EngineError as error:
            failure = error
    if failure is not None:
        raise failure
    return export.attempt(shards.finish)


def _add(shards: ShardWriter, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        shards.add(name, tensor)


def _gather(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the shards of all ranks on the group's first rank, and an empty list on the others."""
    shard = shard.detach().contiguous()
    if group.size() == 1:
        return [shard]
    parts = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(shard, parts, group=group, group_dst=0)
    return parts or []


def _assemble(placed: Placed, parts: list[Tensor], arch: Architecture, dtypes: _Dtypes) -> dict[str, Tensor]:
    """Assemble checkpoint tensors from all shards of one parameter; this reverses ``_fill`` in ``load.py``."""
    _, rule, layer, _ = placed
    named = rule.hf_tensors(arch, layer)
    whole = [torch.empty(tensor.shape, dtype=dtypes[tensor.name]) for tensor in named]
    for rank, part in enumerate(parts):
        for tensor, start, stop, at in pieces(rule, arch, shard_rows=part.shape[0], rank=rank, tp=len(parts)):
            rows = part[at : at + stop - start]
            if rule.cut == 1:
                width = part.shape[1]
                whole[tensor][start:stop, rank * width : (rank + 1) * width] = rows
            else:
                whole[tensor][start:stop] = rows
    for tensor, values in zip(named, whole, strict=True):
        if not torch.isfinite(values).all():
            raise NumbersError(
                f"tensor {tensor.name}: contains values that are not finite in {values.dtype}; nothing was exported; "
                "export an earlier step, or set a dtype with a wider range"
            )
    return {tensor.name: values for tensor, values in zip(named, whole, strict=True)}


def _complete(shares: Sequence[Share], arch: Architecture) -> list[Share]:
    """Return the non-empty shares, after checking that they contain each tensor of the table exactly once."""
    written = [name for share in shares for name in share.files]
    odd = table_names(arch).symmetric_difference(written) or {name for name in written if written.count(name) > 1}
    if odd:
        raise EngineError(f"tensor {min(odd)}: was not written exactly once, by a single pipeline stage")
    return [share for share in shares if share.files]
