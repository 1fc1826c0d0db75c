"""Hugging Face checkpoints into a sharded model and out of it, in any layout, by the family's weight table."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.errors import ConfigError, EngineError, NumbersError
from dpo_engine.model.architecture import FAMILIES, Architecture, read_architecture
from dpo_engine.model.families.blocks import Rule, expected_tensors
from dpo_engine.model.weight_export import Export, ShardWriter, Share, companions, config_text
from dpo_engine.model.weight_files import CheckpointFiles, check_tensors
from dpo_engine.platform.parallel import ParallelGroups, together

TE_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
"""Transformer Engine's fused modules hold the norm's weight; the table uses the names of the local layer spec."""


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of tensor number ``tensor`` lie at row ``at`` of a rank's shard."""

    tensor: int
    start: int
    stop: int
    at: int


def pieces(rule: Rule, arch: Architecture, *, shard_rows: int, rank: int, tp: int) -> list[Piece]:
    """Which rows of a rule's tensors a rank's shard holds, and where; the same for weights, biases and adapters.

    shard_rows   rows of the shard on each of the ``tp`` ranks; rows past the last tensor's (padding) are in no piece

    A rule cut along its columns, or not at all, has all rows on every rank.
    """
    if rule.cut != 0:
        rank, tp = 0, 1
    rows = rule.row_counts(arch)
    parts = {"plain": 1, "vocab": 1, "qkv": arch.num_kv_heads, "glu": tp}[rule.layout]
    low, high = rank * shard_rows, (rank + 1) * shard_rows
    found, at = [], 0
    for part in range(parts):
        for tensor, count in enumerate(rows):
            size = count // parts
            first, last = max(low, at), min(high, at + size)
            if first < last:
                shift = part * size - at
                found.append(Piece(tensor, first + shift, last + shift, first - low))
            at += size
    return found


class Placed(NamedTuple):
    """A parameter of this rank with its rule. ``copy``: a second copy of a tied tensor, loaded but not saved."""

    parameter: Tensor
    rule: Rule
    layer: int | None
    copy: bool


def placed_parameters(chunks: Sequence[nn.Module], arch: Architecture, *, tp: int) -> Iterator[Placed]:
    """Every parameter of this rank's model chunks with the rule that it is made by.

    Raises :class:`~dpo_engine.errors.EngineError` for a parameter without a rule or of another shape than its rule's.
    """
    rules = {rule.parameter: rule for rule in FAMILIES[arch.model_type].rules}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            for fused, plain in TE_NAMES:
                name = name.replace(fused, plain)
            local = re.match(r"decoder\.layers\.(\d+)\.", name)
            layer = chunk.decoder.layers[int(local[1])].layer_number - 1 if local else None
            key = f"decoder.layers.{{l}}.{name[local.end() :]}" if local else name
            if key not in rules:
                raise EngineError(f"parameter {name}: model family {arch.model_type!r} has no rule for it")
            rule = rules[key]
            copy = bool(rule.tied_to and arch.tied_embeddings)
            if copy:
                rule = rules[rule.tied_to]
            _check_shape(name, parameter, rule, arch, tp)
            yield Placed(parameter, rule, layer, copy)


def _check_shape(name: str, parameter: Tensor, rule: Rule, arch: Architecture, tp: int) -> None:
    """A shard that its rule does not exactly fill would be read as another layout; only a vocabulary has padding."""
    shape = [sum(rule.row_counts(arch))] + ([getattr(arch, rule.columns)] if rule.columns else [])
    if rule.layout == "vocab":
        shape[0] = max(shape[0], parameter.shape[0] * tp)
    if rule.cut is not None:
        shape[rule.cut] //= tp
    if list(parameter.shape) != shape:
        raise EngineError(f"parameter {name}: has shape {list(parameter.shape)}, its rule makes {shape}")


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
    dist.all_gather_object(everywhere, used if _writes(groups) else set(), group=groups.world)
    unread = _table_names(arch) - set().union(*everywhere)
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
    names = sorted(_table_names(arch))

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


def save_hf(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    directory: str | Path,
    *,
    source: str | Path,
    groups: ParallelGroups,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write the model as a Hugging Face checkpoint; ``directory`` appears when everything is in it, or not at all.

    source      the checkpoint that the run started from: its config.json, generation config and tokenizer are copied
    tokenizer   where the tokenizer is, if not in ``source``: a directory, or a sentencepiece file
    dtype       of all tensors. None: each tensor keeps the dtype that it has in ``source``, whatever the run computed
                in, so fp32 parameters of a bf16 checkpoint are rounded to bf16

    One rank of each pipeline stage gathers its parameters one by one over tp and writes the stage's files. A directory
    that an earlier export made is replaced; no other is.

    *Collectives*: one gather per cut parameter over tp (dp and cp rank 0 only); four gathers of objects over world.
    Raises :class:`~dpo_engine.errors.EngineError`, on all ranks together, and leaves nothing behind.
    """
    source, export = Path(source), Export(directory)
    leader = groups.world.rank() == 0

    def on_leader(work: Callable[[], None]) -> None:
        together(groups.world, (lambda: export.attempt(work)) if leader else lambda: None)

    def write() -> Share:
        shards = ShardWriter(export.staging, f"stage-{groups.pp.rank():05d}", max_shard_bytes)
        dtypes = _Dtypes(source, dtype)
        return _write_share(chunks, arch, shards, dtypes, export=export, groups=groups)

    def publish() -> None:
        texts = {"config.json": config_text(source, dtype)}
        export.publish(_complete(shares, arch), texts, companions(source, tokenizer))

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
    """The dtype that each exported tensor gets: the one asked for, or that of the source's tensor."""

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
    """Stream this stage's tensors into its shard files, on the one rank of the stage that writes.

    *Collectives* over tp where dp and cp rank are 0: one gather per cut parameter. They are all carried out even after
    an error, which is raised at the end: the other ranks of the group wait in them.
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
    """Every rank's shard on the group's first rank, an empty list on the others."""
    shard = shard.detach().contiguous()
    if group.size() == 1:
        return [shard]
    parts = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(shard, parts, group=group, group_dst=0)
    return parts or []


def _assemble(placed: Placed, parts: list[Tensor], arch: Architecture, dtypes: _Dtypes) -> dict[str, Tensor]:
    """The checkpoint's tensors from all shards of one parameter: the inverse of :func:`_fill`."""
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
                f"tensor {tensor.name}: has values that are not finite in {values.dtype}, so nothing was exported; "
                "export an earlier step, or ask for a dtype of wider range"
            )
    return {tensor.name: values for tensor, values in zip(named, whole, strict=True)}


def _complete(shares: Sequence[Share], arch: Architecture) -> list[Share]:
    """``shares`` if together they hold each tensor of the table exactly once."""
    written = [name for share in shares for name in share.files]
    odd = _table_names(arch).symmetric_difference(written) or {name for name in written if written.count(name) > 1}
    if odd:
        raise EngineError(f"tensor {min(odd)}: must be written exactly once, by one pipeline stage")
    return [share for share in shares if share.files]


def _table_names(arch: Architecture) -> set[str]:
    return {tensor.name for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch)}


def _writes(groups: ParallelGroups) -> bool:
    """Whether this rank speaks for its pipeline stage."""
    return groups.tp.rank() == 0 and groups.dp_cp.rank() == 0
