"""Write and read the tensor files of a checkpoint: one safetensors file per rank, readable in any parallel layout.

All tensors are flat. The key of a tensor is ``kind|parameter|tensor-parallel rank|offset``. The offset is the position
of the tensor's first element in the flattened shard, which is the part of the parameter on that tensor-parallel rank.
For a matrix of an expert, the tensor-parallel rank is the rank in the experts' tensor-parallel group. The kinds are:

- ``main``: the fp32 weights, trained and frozen
- ``exp_avg`` and ``exp_avg_sq``: Adam's moments. Other optimizers have other kinds, such as ``momentum_buffer``
- ``reference``: the weights of a reference that is periodically updated from the policy (``reference.sync_every``)
- ``random``: the state of a random number generator. The key contains the generator's name instead of a parameter, and
  the global rank instead of the tensor-parallel rank.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dpo_engine.atomic_files import HashedFile
from dpo_engine.faults import reach
from dpo_engine.model.families.rule import Rule
from dpo_engine.model.weights.table import Placed

DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
BLOCK = 1 << 22


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], written: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Write flat tensors to one safetensors file and sync it to disk. Return the file's size and SHA-256.

    The tensors can be on a GPU; they are copied one at a time. The hash is computed while writing.

    written  called after each block with the number of its bytes
    """
    # Tensors with larger elements come first, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda key: -tensors[key].element_size())
    header: dict[str, Any] = {}
    total = 0
    for key in ordered:
        size = tensors[key].numel() * tensors[key].element_size()
        places = {"shape": list(tensors[key].shape), "data_offsets": [total, total + size]}
        header[key] = {"dtype": DTYPES[tensors[key].dtype], **places}
        total += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        half, start = total // 2, file.size
        for key in ordered:
            content = memoryview(tensors[key].detach().cpu().contiguous().view(torch.uint8).numpy())
            for first in range(0, len(content), BLOCK):
                before = file.size - start
                block = content[first : first + BLOCK]
                file.write(block)
                written(len(block))
                if before < half <= file.size - start:
                    file.flush()
                    reach("save-shard", path)
    return {"size": file.size, "sha256": file.digest.hexdigest()}


def copy_to_host(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy ``tensors`` to ``buffers`` in host memory, and return the buffers.

    If a tensor has no buffer, or a buffer of a different shape, a new buffer is allocated.
    """
    for key, tensor in tensors.items():
        if key not in buffers or buffers[key].shape != tensor.shape:
            buffers[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        buffers[key].copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    return buffers


class Piece(NamedTuple):
    """One stored tensor: elements ``start`` to ``stop`` of a flattened shard, in ``file`` under ``key``."""

    start: int
    stop: int
    file: str
    key: str


class Pieces:
    """All stored tensors of a checkpoint, indexed by kind, parameter, and the tensor-parallel rank that wrote them.

    source_tp   tensor-parallel size of the run that wrote the checkpoint
    source_etp  tensor-parallel size of the experts in that run
    """

    def __init__(self, directory: Path, files: list[str], *, source_tp: int, source_etp: int):
        self.sources = {False: source_tp, True: source_etp}
        self.files = {name: safe_open(directory / name, "pt") for name in files}
        self.found: dict[tuple[str, str, int], list[Piece]] = defaultdict(list)
        for name, file in self.files.items():
            for key in file.keys():
                kind, parameter, tp_rank, start = key.split("|")
                length = file.get_slice(key).get_shape()[0]
                piece = Piece(int(start), int(start) + length, name, key)
                self.found[kind, parameter, int(tp_rank)].append(piece)

    def flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of the flattened shard that ``tp_rank`` wrote, in fp32.

        Raises ``KeyError`` with the parameter's name if elements are missing.
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

    def random(self, rank: int) -> dict[str, Tensor]:
        """Return the saved states of the random number generators of ``rank``, as uint8 tensors by generator name."""
        pieces = {name: piece for (kind, name, of), (piece, *_) in self.found.items() if (kind, of) == ("random", rank)}
        return {name: self.files[piece.file].get_tensor(piece.key) for name, piece in pieces.items()}

    def size(self, kind: str, name: str, tp_rank: int) -> int:
        """Return the number of elements in the shard that ``tp_rank`` wrote; 0 if there is no such shard."""
        return max((piece.stop for piece in self.found.get((kind, name, tp_rank), ())), default=0)

    def elements(self, kind: str, placed: Placed, start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of this rank's flattened shard, in this run's layout.

        The checkpoint can be from a run with a different tensor-parallel size.

        Raises ``KeyError`` with the parameter's name if elements are missing.
        """
        if placed.rule.cut is None or placed.shards.size() == self.sources[placed.rule.expert]:
            return self.flat(kind, placed.name, placed.shard, start, stop)
        return self._reshard(kind, placed).view(-1)[start:stop]

    def _reshard(self, kind: str, placed: Placed) -> Tensor:
        """Join the saved shards into the full parameter, and return this rank's shard."""
        name, rule, local, tp = placed.name, placed.rule, tuple(placed.parameter.shape), placed.shards.size()
        shards, saved = [], self.sources[rule.expert]
        for source in range(saved):
            count = self.size(kind, name, source)
            if count == 0:
                raise KeyError(f"{kind} of {name}: all elements are missing")
            width = local[1] * tp // saved if rule.cut == 1 else (local[1] if len(local) > 1 else 1)
            shape = (count // width, *((width,) if len(local) > 1 else ()))
            shards.append(self.flat(kind, name, source, 0, count).view(shape))
        return cut_shard(join_shards(shards, rule), rule, local, placed.shard, tp)


def join_shards(shards: list[Tensor], rule: Rule) -> Tensor:
    """Join the shards of all tensor-parallel ranks. In a gated projection, all gate rows come before all up rows."""
    if rule.layout == "glu":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, rule.cut)


def cut_shard(whole: Tensor, rule: Rule, local: tuple[int, ...], tp_rank: int, tp: int) -> Tensor:
    """Cut rank ``tp_rank``'s shard, of shape ``local``, from a parameter joined by :func:`join_shards`.

    The number of padding rows in a vocabulary parameter depends on the layout. Padding rows added here are zero.
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
