"""Write safetensors files: the shard files of one rank, and a single file that joins the files of several ranks."""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from dpo_engine.atomic_files import sync
from dpo_engine.errors import CheckpointError

MADE_BY_US = {"format": "pt", "writer": "dpo-engine"}
"""Metadata in every shard file that we write. A directory with other shard files is never replaced."""


class Share(NamedTuple):
    """Record of what one rank has written: the name of each tensor's file, and the total size of the tensors."""

    files: dict[str, str]
    num_bytes: int


class Filling:
    """Division of a sequence of tensors into files, by the sizes of the tensors alone.

    max_bytes   maximum total size of the tensors in one file; a file with a single tensor can be larger
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._bytes = 0

    def completes(self, size: int) -> bool:
        """Add a tensor of ``size`` bytes.

        Returns whether the tensor begins a new file, which means that the previous file is complete.
        """
        begins = self._bytes > 0 and self._bytes + size > self.max_bytes
        self._bytes = size if begins else self._bytes + size
        return begins


class ShardWriter:
    """Writer of one rank's shard files in ``directory``.

    prefix      start of this rank's file names. Each rank has a different prefix. The prefixes determine the order of
                the files in an export
    max_bytes   as for :class:`Filling`

    The writer keeps in host memory the complete files that have not been written yet, and one incomplete file.
    """

    def __init__(self, directory: Path, prefix: str, max_bytes: int):
        self.directory = directory
        self.prefix = prefix
        self.files: dict[str, str] = {}
        self.num_bytes = 0
        self._filling = Filling(max_bytes)
        self._held: dict[str, Tensor] = {}
        self._complete: list[dict[str, Tensor]] = []
        self._written = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one complete tensor (contiguous, in CPU memory). Nothing is written before :meth:`flush`."""
        if self._filling.completes(tensor.nbytes):
            self._complete.append(self._held)
            self._held = {}
        self._held[name] = tensor

    def flush(self) -> None:
        """Write the files that are complete."""
        while self._complete:
            self._write(self._complete[0])
            del self._complete[0]

    def finish(self) -> Share:
        """Write the remaining tensors. Return what this rank has written."""
        self.flush()
        if self._held:
            self._write(self._held)
            self._held = {}
        return Share(self.files, self.num_bytes)

    def _write(self, tensors: dict[str, Tensor]) -> None:
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory.parent}: this node cannot see the export directory made by rank 0; export to a file "
                "system that all nodes share"
            )
        path = self.directory / f"{self.prefix}-{self._written:05d}.safetensors"
        save_file(tensors, path, metadata=MADE_BY_US)
        _sort_metadata(path)
        path.chmod(0o666 & ~_umask())  # safetensors creates files that only the owner can read
        sync(path)
        self.files |= dict.fromkeys(tensors, path.name)
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._written += 1


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place, because safetensors writes it in a random order."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def join_files(sources: Sequence[Path], target: Path) -> None:
    """Join safetensors files with different tensors into one file, without loading them into memory."""
    tensors, parts, total = {}, [], 0
    for source in sources:
        with open(source, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            tensors[name] = {**entry, "data_offsets": [total + start, total + stop]}
        parts.append((source, 8 + size))
        total += source.stat().st_size - 8 - size
    text = json.dumps({"__metadata__": MADE_BY_US, **tensors}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as joined:
        joined.write(struct.pack("<Q", len(text)) + text)
        for source, start in parts:
            with open(source, "rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, joined, 1 << 24)
    sync(target)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
