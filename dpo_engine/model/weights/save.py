"""Save a sharded model as a Hugging Face checkpoint, in any parallel layout."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.data.hub import model_directory
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.errors import EngineError, NumbersError
from dpo_engine.faults import reach
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.export import (
    CARD,
    GENERATION,
    PROCESSOR_FILES,
    Export,
    companions,
    config_text,
    sealed,
)
from dpo_engine.model.weights.files import CheckpointFiles, carried
from dpo_engine.model.weights.fused import exported_names
from dpo_engine.model.weights.joined import Joined, completed_tensors, gather_experts, gather_on_first, written_fused
from dpo_engine.model.weights.kept import copy_kept, kept_tensors
from dpo_engine.model.weights.shard_files import Filling, ShardWriter, Share
from dpo_engine.model.weights.table import Placed, pieces, placed_parameters
from dpo_engine.model.weights.tokenizer_files import AUTO, Files, exported_tokenizer
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.platform.parallel import ParallelGroups, communication_error

Change = Callable[[str, Tensor, torch.dtype], Tensor]
"""A function ``(name, complete tensor, dtype)`` that returns the tensor to write, in ``dtype``."""


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
    change: Change | None = None,
    adapter: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the model as a Hugging Face checkpoint; ``directory`` is published atomically.

    source        directory or Hub id of the checkpoint that the run started from. The export gets copies of the
                  checkpoint's generation config and of the files of a multimodal model's processor. If ``tokenizer`` is
                  None, the export also gets a copy of the checkpoint's tokenizer. The checkpoint's config.json is
                  copied with the changes of :func:`~dpo_engine.model.weights.export.config_text`
    tokenizer     directory, SentencePiece file or Hub id of the tokenizer; None if the tokenizer is in ``source``
    trained_with  the run's tokenizer, as loaded for training, with its chat template. The exported files are compared
                  with it on the first rank; other ranks ignore it. None: the files are copied without a comparison
    card          function that returns the content of README.md; its argument is the name of the transformers class
                  that reads the exported tokenizer. None: no README.md
    say           function that logs a line; called on the first rank. It gets one line for each chat template that is
                  not exported, one line if transformers does not reproduce the training tokenizer, and one line if
                  layers for multi-token prediction are copied
    dtype         dtype of all exported tensors, except those of layers for multi-token prediction, which are copied bit
                  for bit. None: each tensor gets the dtype that it has in ``source``, whatever dtype the run used. If
                  fp32 parameters were loaded from a bf16 checkpoint, they are therefore rounded to bf16
    change        function that changes each tensor before it is written, to merge adapters; the adapters' own
                  parameters are not written. It is not called for tensors that are copied from ``source``
    adapter       directory of the adapter that the run started from; the export must not replace this directory. None:
                  the run did not start from an adapter

    The export works in rounds. In a round, one rank of each pipeline stage gathers the stage's parameters over tp, one
    by one, until it has a complete file, and writes this file. Experts are gathered over expt_tp and written in the
    same way. If data-parallel ranks hold copies of an expert, only the first copy is written. One of the ranks that
    share this copy gathers its shards. If the export has tensors with all experts of a layer, the first rank of ep
    gathers and writes all experts. In each round, all ranks wait, without a time limit, until the files are written. An
    existing directory is replaced only if it is empty or contains only an earlier export.

    *Collectives*: one gather over tp for each sharded parameter outside of experts, only on the first ranks of dp_cp.
    One gather over expt_tp for each sharded parameter of experts, only on the first ranks of expt_dp. One more gather
    over ep for each parameter of experts that are exported together. Over world, a few all-gathers of objects, and two
    more in each round; the rank with the most rounds determines the number of rounds.
    On failure, removes the partial export and raises :class:`~dpo_engine.errors.EngineError` on all ranks.
    """
    source, export = model_directory(source), Export(directory)
    tokenizer = tokenizer and model_directory(tokenizer, "model.tokenizer")
    world, leader = groups.world, groups.world.rank() == 0
    meter = Meter(f"exporting to {directory}")
    owner = "" if groups.tp.rank() == 0 and groups.dp_cp.rank() == 0 else f"-experts-{world.rank():05d}"
    shards = ShardWriter(export.staging, f"stage-{groups.pp.rank():05d}{owner}", max_shard_bytes)

    def prepare() -> None:
        export.attempt(lambda: reach("export", export.directory))
        if leader:
            export.attempt(lambda: export.open(source, adapter))

    def publish() -> None:
        files: Files = dict(companions(source, tokenizer))
        config, loader = config_text(source, dtype), AUTO
        if trained_with is not None:
            others = {name: files.pop(name) for name in (GENERATION, *PROCESSOR_FILES) if name in files}
            files, loader, notes = exported_tokenizer(files, config, trained_with)
            files |= others
            for note in notes:
                say(note)
        if card is not None:
            files[CARD] = sealed(card(loader)).encode()
        unchanged = {*kept, *_carried_names(source, arch)}
        export.publish(_complete(shares, arch, unchanged), {**files, "config.json": config.encode()})

    def keep() -> list[str]:
        files = CheckpointFiles(source)
        if names := kept_tensors(files, arch):
            writer = ShardWriter(export.staging, "stage-kept", max_shard_bytes)
            shares.append(export.attempt(lambda: copy_kept(files, names, writer)))
            say(f"copied {len(names)} tensors of layers for multi-token prediction unchanged from {source}")
        return names

    try:
        without_time_limit(world, prepare, meter)
        dtypes, rounds = without_time_limit(
            world, lambda: _plan(chunks, arch, source, dtype, max_shard_bytes, groups, meter), meter
        )
        counts = [0] * world.size()
        dist.all_gather_object(counts, len(rounds), group=world)
        joined = Joined()
        for at in range(max(counts)):
            placed = rounds[at] if at < len(rounds) else []
            failure = _collect(placed, arch, shards, dtypes, change, joined)
            last = at + 1 == len(rounds)
            if last and failure is None and leader:
                failure = _carry(source, arch, shards, dtype)
            without_time_limit(world, lambda f=failure, last=last: _write(f, export, shards, meter, last=last), meter)
        shares: list[Share] = [Share({}, 0)] * world.size()
        dist.all_gather_object(shares, Share(shards.files, shards.num_bytes), group=world)
        kept = without_time_limit(world, keep if leader else list, meter)
        without_time_limit(world, (lambda: export.attempt(publish)) if leader else lambda: None, meter)
    except EngineError:
        if leader:
            export.discard()
        raise


def _plan(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    source: Path,
    dtype: torch.dtype | None,
    max_bytes: int,
    groups: ParallelGroups,
    meter: Meter,
) -> tuple[dict[str, torch.dtype], list[list[Placed]]]:
    """Return the dtype of each tensor that this rank exports, and the parameters that it gathers, in rounds.

    If one rank writes all parameters of a stage, the parameters of a round fill one file. If several ranks write them,
    a rank can need several rounds to fill a file. Corresponding parameters of all ranks of a stage are in the same
    round, because the sizes that determine the rounds are the same on these ranks. A rank has no rounds if other ranks
    hold the first copies of all its parameters. The total of ``meter`` grows by the size of what this rank writes.
    """
    if groups.dp_cp.rank() != 0 and groups.expt_dp.rank() != 0:
        return {}, []
    files = CheckpointFiles(source) if dtype is None else None
    filling, dtypes, rounds = Filling(max_bytes), {}, [[]]
    for placed in placed_parameters(chunks, arch, groups):
        if placed.copy or placed.rule.adapter:
            continue
        completed, gathered = False, placed.copies.rank() == 0
        for tensor in placed.tensors(arch):
            dtypes[tensor.name] = dtype or files.dtype(tensor.name)
        fused = written_fused(placed, arch)
        if fused is not None:
            dtypes[fused.name] = dtypes[tensor.name]
        writes = gathered and placed.shards.rank() == 0 and (fused is None or placed.owners.rank() == 0)
        for tensor in completed_tensors(placed, arch):
            size = math.prod(tensor.shape) * dtypes[tensor.name].itemsize
            completed |= filling.completes(size)
            meter.total += size if writes else 0
        if gathered:
            rounds[-1].append(placed)
        if completed:
            rounds.append([])
    return dtypes, rounds


def _collect(
    every: Sequence[Placed],
    arch: Architecture,
    shards: ShardWriter,
    dtypes: Mapping[str, torch.dtype],
    change: Change | None,
    joined: Joined,
) -> Exception | None:
    """Gather each parameter on one rank, which adds the parameter's tensors to its ``shards``.

    This rank is the first of the ranks that hold the parameter's shards. Experts that are exported together are
    gathered on the first of all ranks that own these experts. Files are not written here.

    joined  incomplete tensors: each will contain all experts of a layer, but some of these experts are not gathered yet

    *Collectives*: for each parameter, those of :func:`gather_shards` or, for experts that are exported together, of
    :func:`gather_experts`. After an error, the remaining gathers still run, because the other ranks take part in them.
    Returns the error, or None.
    """
    failure = None
    for placed in every:
        fused = written_fused(placed, arch)
        gathered = [(placed, gather_shards(placed))] if fused is None else [*gather_experts(placed, arch)]
        if placed.shards.rank() != 0 or failure is not None:
            continue
        try:
            for one, parts in gathered:
                kinds = dtypes if fused is None else {one.tensors(arch)[0].name: dtypes[fused.name]}
                for name, tensor in assemble(one, parts, arch, kinds, change).items():
                    complete = {name: tensor} if fused is None else joined.add(fused, one.expert, tensor)
                    for whole in complete:
                        shards.add(whole, complete[whole])
        except Exception as error:
            if communication_error(error):
                raise
            failure = error
    return failure


def _carry(source: Path, arch: Architecture, shards: ShardWriter, dtype: torch.dtype | None) -> Exception | None:
    """Add the tensors that exports copy from ``source`` (:func:`carried`), in ``dtype``. Return an error, or None.

    dtype  None: the tensors are added unchanged
    """
    try:
        for name in _carried_names(source, arch):
            tensor = CheckpointFiles(source).slices([name])[0][:]
            shards.add(name, tensor if dtype is None else tensor.to(dtype))
    except EngineError as error:
        return error
    return None


def _write(failure: Exception | None, export: Export, shards: ShardWriter, meter: Meter, *, last: bool) -> None:
    """Write this rank's complete files or, after the last round, all files. Raise ``failure`` if it is not None."""
    if failure is not None:
        raise failure
    export.attempt(shards.finish if last else shards.flush)
    meter.done = shards.num_bytes


def gather_shards(placed: Placed) -> list[Tensor]:
    """Return all shards of a parameter on the first rank of ``placed.shards``, and an empty list on the others.

    If the parameter is not sharded, return the whole parameter, in a list, on every rank.

    *Collectives*: one gather over ``placed.shards`` if the parameter is sharded.
    """
    shard = placed.parameter.detach()
    return [shard] if placed.rule.cut is None else gather_on_first(shard, placed.shards)


def assemble(
    placed: Placed,
    parts: list[Tensor],
    arch: Architecture,
    dtypes: Mapping[str, torch.dtype],
    change: Change | None = None,
) -> dict[str, Tensor]:
    """Assemble checkpoint tensors from all shards of one parameter; this reverses ``fill_parameter`` in ``load.py``.

    change   function that changes each complete tensor, given its name, and rounds the result to the tensor's dtype

    Raises :class:`~dpo_engine.errors.NumbersError` if a value is not finite in its dtype.
    """
    rule, named = placed.rule, placed.tensors(arch)
    whole = [torch.empty(tensor.shape, dtype=parts[0].dtype if change else dtypes[tensor.name]) for tensor in named]
    for rank, part in enumerate(parts):
        for tensor, taken, place in pieces(rule, arch, shard_rows=part.shape[0], rank=rank, tp=len(parts)):
            rows = part[place]
            target = whole[tensor].T if rule.transposed else whole[tensor]
            if rule.cut == 1:
                width = part.shape[1]
                target[taken, rank * width : (rank + 1) * width] = rows
            else:
                target[taken] = rows
    if change is not None:
        whole = [change(tensor.name, values, dtypes[tensor.name]) for tensor, values in zip(named, whole, strict=True)]
    for tensor, values in zip(named, whole, strict=True):
        if not torch.isfinite(values).all():
            raise NumbersError(
                f"tensor {tensor.name}: contains values that are not finite in {values.dtype}; nothing was exported; "
                "export an earlier step, or set a dtype with a wider range"
            )
    return {tensor.name: values for tensor, values in zip(named, whole, strict=True)}


def _carried_names(source: Path, arch: Architecture) -> list[str]:
    starts = carried(arch)
    return sorted(name for name in CheckpointFiles(source).file_of if name.startswith(starts)) if starts else []


def _complete(shares: Sequence[Share], arch: Architecture, unchanged: Collection[str]) -> list[Share]:
    """Return the non-empty shares, after checking that they contain each tensor exactly once.

    unchanged   names of the tensors that were copied from ``source``; the weight table does not contain them
    """
    written = [name for share in shares for name in share.files]
    odd = exported_names(arch).union(unchanged).symmetric_difference(written)
    odd = odd or {name for name, count in Counter(written).items() if count > 1}
    if odd:
        raise EngineError(f"tensor {min(odd)}: must be written exactly once, by a single rank")
    return [share for share in shares if share.files]
