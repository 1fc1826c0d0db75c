"""Writing a Hugging Face checkpoint: shard files by several ranks, and a directory that appears whole or not at all."""

import json
import os
import shutil
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
"""Metadata of every shard file; a directory whose shards lack it is never replaced."""


class Share(NamedTuple):
    """What one rank wrote: file names by tensor, and how many bytes of tensors."""

    files: dict[str, str]
    num_bytes: int


class ShardWriter:
    """One rank's shard files in ``directory``; holds the tensors of at most one file in memory.

    prefix      tells this rank's files from those of other ranks, and puts them in order
    max_bytes   of tensors in one file, unless a single tensor is larger
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
        """Take one whole tensor (in CPU memory, contiguous); writes a file when the next one is due."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_bytes:
            self._write()
        self._held[name] = tensor
        self._held_bytes += size

    def _write(self) -> None:
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory.parent}: another node's export cannot be seen from this one; export to a file system "
                "that all nodes share"
            )
        path = self.directory / f"{self.prefix}-{self._written:05d}.safetensors"
        save_file(self._held, path, metadata=MADE_BY_US)
        path.chmod(0o666 & ~_umask())  # safetensors gives its files to the owner alone
        sync(path)
        self.files |= dict.fromkeys(self._held, path.name)
        self.num_bytes += self._held_bytes
        self._held, self._held_bytes, self._written = {}, 0, self._written + 1

    def finish(self) -> Share:
        """Write what is left."""
        if self._held:
            self._write()
        return Share(self.files, self.num_bytes)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def companion(directory: Path, name: str, key: str) -> Path | None:
    """The real path of the file ``name`` of a checkpoint, or None if there is none.

    A link may lead elsewhere in the directory, or into the ``blobs`` of a Hugging Face cache that the directory is a
    snapshot of; anything else could carry a private file into the export.

    Raises :class:`~dpo_engine.errors.ConfigError` for other links and for what is not a regular file.
    """
    home = directory.resolve()
    path = home / name
    if not os.path.lexists(path):
        return None
    real = path.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in allowed):
        raise ConfigError(f"{key}={directory}: {name} is a link out of that directory; put the file itself there")
    if not real.is_file():
        raise ConfigError(f"{key}={directory}: {name} is not a regular file; put the file itself there")
    return real


def companions(source: Path, tokenizer: str | Path | None) -> dict[str, Path]:
    """The files that travel with the weights, by the name they get: how to generate, and the tokenizer.

    source      the checkpoint that the run started from
    tokenizer   where the tokenizer is, if not in ``source``: a directory, or a sentencepiece file

    Only well-known names are taken, none of which holds code.
    """
    found = {GENERATION: companion(source, GENERATION, "model.path")}
    tokenizer = None if tokenizer is None else Path(tokenizer)
    if tokenizer is not None and tokenizer.is_file():
        found["tokenizer.model"] = companion(tokenizer.parent, tokenizer.name, "model.tokenizer")
    else:
        home, key = (source, "model.path") if tokenizer is None else (tokenizer, "model.tokenizer")
        found |= {name: companion(home, name, key) for name in TOKENIZER_FILES}
    return {name: path for name, path in found.items() if path is not None}


def config_text(source: Path, dtype: torch.dtype | None) -> str:
    """The source's ``config.json`` for an export: the dtype it now has, and no pointer to code (``auto_map``)."""
    companion(source, "config.json", "model.path")
    values = read_config_json(source).values
    values.pop("auto_map", None)
    if dtype is not None:
        key = "dtype" if "dtype" in values else "torch_dtype"
        values[key] = str(dtype).removeprefix("torch.")
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


class Export:
    """A directory in the making: filled beside its place under another name, then renamed.

    One rank calls :meth:`open`, :meth:`publish` and :meth:`discard`; any number of them write shard files into
    :attr:`staging` in between.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).resolve()
        self.staging = self.directory.with_name(f".{self.directory.name}.partial")
        self.replaced = self.directory.with_name(f".{self.directory.name}.replaced")

    def open(self, source: Path) -> None:
        """Make an empty staging directory, after undoing what an interrupted export left.

        Raises :class:`~dpo_engine.errors.CheckpointError` as :meth:`refusal` says.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        if self.replaced.exists() and not self.directory.exists():
            os.rename(self.replaced, self.directory)
        for leftover in (self.staging, self.replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        if refusal := self.refusal(source):
            raise CheckpointError(f"{self.directory}: {refusal}; give another directory for the export")
        self.staging.mkdir()

    def refusal(self, source: Path) -> str | None:
        """What is said when the place is taken by anything but an earlier export; ``None`` when it is free."""
        if self.directory == source.resolve():
            return "is model.path itself"
        try:
            stranger = self._stranger()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return stranger and f"holds {stranger}, not made by an export"

    def _stranger(self) -> str | None:
        """Something in the target directory that no export of ours put there."""
        if self.directory.exists() and not self.directory.is_dir():
            return "a file of that name"
        known = {"config.json", INDEX, GENERATION, *TOKENIZER_FILES}
        for path in sorted(self.directory.iterdir()) if self.directory.exists() else []:
            if path.suffix == ".safetensors" and not path.is_symlink():
                try:
                    with safe_open(path, "pt") as file:
                        ours = (file.metadata() or {}).get("writer") == MADE_BY_US["writer"]
                except (OSError, SafetensorError):
                    ours = False
            else:
                ours = path.name in known and path.is_file()
            if not ours:
                return path.name
        return None

    def publish(self, shares: list[Share], texts: dict[str, str], copies: dict[str, Path]) -> None:
        """Give the shard files their final names, add the index and the other files, and move all into place.

        shares   what each rank wrote
        texts    files to write, by name       copies   files to copy, by the name they get
        """
        place = {name: file for share in shares for name, file in share.files.items()}
        files = sorted(set(place.values()))
        count = len(files)
        final = {file: f"model-{at:05d}-of-{count:05d}.safetensors" for at, file in enumerate(files, start=1)}
        if count == 1:
            final = {files[0]: SINGLE}
        else:
            weight_map = {name: final[file] for name, file in sorted(place.items())}
            total = sum(share.num_bytes for share in shares)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            texts = {**texts, INDEX: json.dumps(index, indent=2) + "\n"}
        for old, new in final.items():
            os.rename(self.staging / old, self.staging / new)
        for name, text in texts.items():
            (self.staging / name).write_text(text, encoding="utf-8")
        for name, path in copies.items():
            shutil.copyfile(path, self.staging / name)
        for name in (*texts, *copies, "."):
            sync(self.staging / name)
        if self.directory.exists():
            os.rename(self.directory, self.replaced)
        os.rename(self.staging, self.directory)
        sync(self.directory.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def attempt(self, work: Callable[[], T]) -> T:
        """``work()``, with errors of the operating system (a full disk, a missing permission) made the engine's own.

        Raises :class:`~dpo_engine.errors.CheckpointError` naming the directory.
        """
        try:
            return work()
        except (OSError, SafetensorError) as failure:
            raise CheckpointError(
                f"{self.directory}: cannot be written ({failure}); free it and export again"
            ) from None

    def discard(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self.staging, ignore_errors=True)
