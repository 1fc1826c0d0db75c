"""Write a Hugging Face checkpoint: several ranks write shard files, and the directory is published atomically."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_engine.atomic_files import sync
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.model.architecture import read_config_json
from dpo_engine.model.weights.files import INDEX, SINGLE
from dpo_engine.model.weights.tokenizer_files import NAME, NAMED, Files

T = TypeVar("T")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
GENERATION = "generation_config.json"
MADE_BY_US = {"format": "pt", "writer": "dpo-engine"}
"""Metadata of every shard file. A directory with shard files that lack it is never replaced."""
CARD = "README.md"
SEAL = "<!-- written by dpo-engine; SHA-256 of the lines above: {} -->\n"
"""Last line of a model card. A directory whose card lacks it, or was edited, is never replaced."""


class Share(NamedTuple):
    """What one rank wrote: the file name of each tensor, and the total size of the tensors."""

    files: dict[str, str]
    num_bytes: int


class ShardWriter:
    """Writer of one rank's shard files in ``directory``; holds the tensors of at most one file in memory.

    prefix      distinguishes this rank's files from those of other ranks, and sorts them
    max_bytes   limit for the tensors in one file; a file with a single tensor may exceed it
    """

    def __init__(self, directory: Path, prefix: str, max_bytes: int):
        self.directory = directory
        self.prefix = prefix
        self.max_bytes = max_bytes
        self.files: dict[str, str] = {}
        self.num_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._written = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one full tensor (contiguous, in CPU memory); writes the held tensors first if the limit requires it."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_bytes:
            self._write()
        self._held[name] = tensor
        self._held_bytes += size

    def _write(self) -> None:
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory.parent}: this node cannot see the export directory made by rank 0; export to a file "
                "system that all nodes share"
            )
        path = self.directory / f"{self.prefix}-{self._written:05d}.safetensors"
        save_file(self._held, path, metadata=MADE_BY_US)
        _sort_metadata(path)
        path.chmod(0o666 & ~_umask())  # safetensors makes files readable by the owner only
        sync(path)
        self.files |= dict.fromkeys(self._held, path.name)
        self.num_bytes += self._held_bytes
        self._held, self._held_bytes, self._written = {}, 0, self._written + 1

    def finish(self) -> Share:
        """Write the remaining tensors and return what was written."""
        if self._held:
            self._write()
        return Share(self.files, self.num_bytes)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: safetensors writes them in a random order."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def sealed(card: str) -> str:
    """Add the last line to a model card, by which a later export recognizes the card as unedited."""
    return card + SEAL.format(hashlib.sha256(card.encode()).hexdigest())


def _is_sealed(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        return False
    card = text.removesuffix("\n").rpartition("\n")[0]
    return sealed(f"{card}\n") == text


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def companion(directory: Path, name: str, key: str) -> Path | None:
    """Return the resolved path of the file ``name`` of a checkpoint, or None if it does not exist.

    A symbolic link may point into the directory itself or, if the directory is a snapshot of a Hugging Face cache, into
    the cache's ``blobs``. Any other link could copy a private file into the export.

    Raises :class:`~dpo_engine.errors.ConfigError` for other links and for anything that is not a regular file.
    """
    home = directory.resolve()
    path = home / name
    if not os.path.lexists(path):
        return None
    real = path.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in allowed):
        raise ConfigError(f"{key}={directory}: {name} links to a file outside that directory; replace it with a copy")
    if not real.is_file():
        raise ConfigError(f"{key}={directory}: {name} is not a regular file; replace it with a regular file")
    return real


def companions(source: Path, tokenizer: str | Path | None) -> dict[str, Path]:
    """The files to export with the weights, by their name in the export: generation config and tokenizer files.

    source      the checkpoint that the run started from
    tokenizer   location of the tokenizer if it is not in ``source``: a directory or a SentencePiece file

    Only files with well-known names are exported. None of them contains code.
    """
    found = {GENERATION: companion(source, GENERATION, "model.path")}
    tokenizer = None if tokenizer is None else Path(tokenizer)
    if tokenizer is not None and tokenizer.is_file():
        found["tokenizer.model"] = companion(tokenizer.parent, tokenizer.name, "model.tokenizer")
    else:
        home, key = (source, "model.path") if tokenizer is None else (tokenizer, "model.tokenizer")
        found |= {name: companion(home, name, key) for name in (*TOKENIZER_FILES, *_named_templates(home))}
    return {name: path for name, path in found.items() if path is not None}


def _named_templates(home: Path) -> list[str]:
    """Names of the files of named chat templates in a tokenizer's directory, relative to the directory."""
    return sorted(f"{NAMED}/{path.name}" for path in (home / NAMED).glob("*.jinja") if NAME.fullmatch(path.name))


def config_text(source: Path, dtype: torch.dtype | None) -> str:
    """The source's ``config.json`` for an export: with the exported dtype, and without ``auto_map``, a link to code."""
    companion(source, "config.json", "model.path")
    values = read_config_json(source).values
    values.pop("auto_map", None)
    if dtype is not None:
        key = "dtype" if "dtype" in values else "torch_dtype"
        values[key] = str(dtype).removeprefix("torch.")
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


class Export:
    """An export directory that is filled under a temporary name next to its final place, and then renamed.

    One rank calls :meth:`open`, :meth:`publish` and :meth:`discard`. In between, any number of ranks write shard files
    into :attr:`staging`.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).resolve()
        self.staging = self.directory.with_name(f".{self.directory.name}.partial")
        self.replaced = self.directory.with_name(f".{self.directory.name}.replaced")

    def open(self, source: Path) -> None:
        """Create an empty staging directory, after cleaning up what an interrupted export left.

        Raises :class:`~dpo_engine.errors.CheckpointError` if :meth:`refusal` returns a reason.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        if self.replaced.exists() and not self.directory.exists():
            os.rename(self.replaced, self.directory)
        for leftover in (self.staging, self.replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        if refusal := self.refusal(source):
            raise CheckpointError(f"{self.directory}: {refusal}; choose another directory for the export")
        self.staging.mkdir()

    def refusal(self, source: Path) -> str | None:
        """Return why the directory must not be written, or ``None`` if it is free or holds an earlier export."""
        if self.directory == source.resolve():
            return "is model.path itself"
        try:
            stranger = self._stranger()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return stranger and f"is occupied by {stranger}, which no export made"

    def _stranger(self) -> str | None:
        """The name of a file in the target directory that was not written by an export of ours, or None."""
        if self.directory.exists() and not self.directory.is_dir():
            return "a regular file"
        known = {"config.json", INDEX, GENERATION, *TOKENIZER_FILES}
        for path in sorted(self.directory.iterdir()) if self.directory.exists() else []:
            if path.suffix == ".safetensors" and not path.is_symlink():
                try:
                    with safe_open(path, "pt") as file:
                        ours = (file.metadata() or {}).get("writer") == MADE_BY_US["writer"]
                except (OSError, SafetensorError):
                    ours = False
            elif path.name == CARD:
                ours = path.is_file() and _is_sealed(path)
            elif path.name == NAMED and path.is_dir() and not path.is_symlink():
                ours = all(inner.suffix == ".jinja" and inner.is_file() for inner in path.iterdir())
            else:
                ours = path.name in known and path.is_file()
            if not ours:
                return path.name
        return None

    def publish(self, shares: list[Share], files: Files) -> None:
        """Give the shard files their final names, add the index and the other files, and publish the directory.

        shares   what each rank wrote
        files    other files of the export by name: the content, or the file to copy
        """
        place = {name: file for share in shares for name, file in share.files.items()}
        written = sorted(set(place.values()))
        count = len(written)
        final = {file: f"model-{at:05d}-of-{count:05d}.safetensors" for at, file in enumerate(written, start=1)}
        if count == 1:
            final = {written[0]: SINGLE}
        else:
            weight_map = {name: final[file] for name, file in sorted(place.items())}
            total = sum(share.num_bytes for share in shares)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files = {**files, INDEX: (json.dumps(index, indent=2) + "\n").encode()}
        for old, new in final.items():
            os.rename(self.staging / old, self.staging / new)
        for name, content in files.items():
            path = self.staging / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
            sync(path)
        for folder in {(self.staging / name).parent for name in files} | {self.staging}:
            sync(folder)
        if self.directory.exists():
            os.rename(self.directory, self.replaced)
        os.rename(self.staging, self.directory)
        sync(self.directory.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def attempt(self, work: Callable[[], T]) -> T:
        """Return ``work()``; convert errors such as a full disk or a missing permission to the engine's own.

        Raises :class:`~dpo_engine.errors.CheckpointError`, which names the directory.
        """
        try:
            return work()
        except (OSError, SafetensorError) as failure:
            raise CheckpointError(
                f"{self.directory}: cannot be written ({failure}); fix this and export again"
            ) from None

    def discard(self) -> None:
        """Remove the staging directory."""
        shutil.rmtree(self.staging, ignore_errors=True)
