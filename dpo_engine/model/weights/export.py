"""Write a Hugging Face checkpoint: several ranks write shard files, and one rank publishes the directory atomically."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from dpo_engine.atomic_files import sync
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.model.architecture import read_config_json
from dpo_engine.model.weights.files import ADAPTER_CONFIG, INDEX, SINGLE
from dpo_engine.model.weights.shard_files import MADE_BY_US, Share, join_files
from dpo_engine.model.weights.tokenizer_files import NAME, NAMED, Files

T = TypeVar("T")

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of a multimodal model that describe the preprocessing of images."""
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
CARD = "README.md"
SEAL = "<!-- written by dpo-engine; SHA-256 of the lines above: {} -->\n"
"""Last line of a model card. A directory whose model card lacks this line, or was edited, is never replaced."""


def sealed(card: str) -> str:
    """Add the last line to a model card. With this line, a later export can check that the card was not edited."""
    return card + SEAL.format(hashlib.sha256(card.encode()).hexdigest())


def _is_sealed(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError:
        return False
    card = text.removesuffix("\n").rpartition("\n")[0]
    return sealed(f"{card}\n") == text


def companion(directory: Path, name: str, key: str) -> Path | None:
    """Return the resolved path of the file ``name`` in a checkpoint directory, or None if there is no such file.

    A symbolic link may point into the directory itself or, if the directory is a snapshot in a Hugging Face cache, into
    the cache's ``blobs``. Other links are refused, because they could bring a private file into the export.

    Raises :class:`~dpo_engine.errors.ConfigError` for other links, and if ``name`` is not a regular file.
    """
    home = directory.resolve()
    path = home / name
    if not os.path.lexists(path):
        return None
    real = path.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in allowed):
        raise ConfigError(
            f"{key}={directory}: {name} links to a file outside that directory; replace the link with a copy"
        )
    if not real.is_file():
        raise ConfigError(f"{key}={directory}: {name} is not a regular file; replace it with a regular file")
    return real


def companions(source: Path, tokenizer: str | Path | None) -> dict[str, Path]:
    """Return the files to export with the weights, as a mapping from names in the export to existing files.

    These are the generation config, the files of a multimodal model's processor, and the tokenizer's files.

    source      directory of the checkpoint from which the run started
    tokenizer   directory or SentencePiece file of the tokenizer; None if the tokenizer is in ``source``

    Other files in these directories, such as Python code, are not exported.
    """
    found = {name: companion(source, name, "model.path") for name in (GENERATION, *PROCESSOR_FILES)}
    tokenizer = None if tokenizer is None else Path(tokenizer)
    if tokenizer is not None and tokenizer.is_file():
        found["tokenizer.model"] = companion(tokenizer.parent, tokenizer.name, "model.tokenizer")
    else:
        home, key = (source, "model.path") if tokenizer is None else (tokenizer, "model.tokenizer")
        found |= {name: companion(home, name, key) for name in (*TOKENIZER_FILES, *_named_templates(home))}
    return {name: path for name, path in found.items() if path is not None}


def _named_templates(home: Path) -> list[str]:
    """Return the paths of the files of named chat templates, relative to the tokenizer's directory ``home``."""
    return sorted(f"{NAMED}/{path.name}" for path in (home / NAMED).glob("*.jinja") if NAME.fullmatch(path.name))


def config_text(source: Path, dtype: torch.dtype | None) -> str:
    """Return the text of the exported ``config.json``: the source's fields, with the dtype of the exported weights.

    The fields ``auto_map`` and ``quantization_config`` are left out: ``auto_map`` makes transformers load code, and
    exported weights are not quantized.
    """
    companion(source, "config.json", "model.path")
    values = read_config_json(source).values
    for name in ("auto_map", "quantization_config"):
        values.pop(name, None)
    if dtype is not None:
        key = "dtype" if "dtype" in values else "torch_dtype"
        values[key] = str(dtype).removeprefix("torch.")
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


class Export:
    """An export directory, which is filled under a temporary name in the same parent directory and then renamed.

    A single rank calls :meth:`open`, and then :meth:`publish`, :meth:`publish_single` or :meth:`discard`. In between,
    any number of ranks write shard files into :attr:`staging`.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).resolve()
        self.staging = self.directory.with_name(f".{self.directory.name}.partial")
        self.replaced = self.directory.with_name(f".{self.directory.name}.replaced")

    def open(self, source: Path, adapter: Path | None = None) -> None:
        """Clean up after an interrupted export, and create an empty staging directory.

        source, adapter   directories that the run reads (model.path and adapter.path) and that must not be replaced

        Raises :class:`~dpo_engine.errors.CheckpointError` if :meth:`refusal` returns a reason.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        if self.replaced.exists() and not self.directory.exists():
            os.rename(self.replaced, self.directory)
        for leftover in (self.staging, self.replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        if refusal := self.refusal(source, adapter):
            raise CheckpointError(f"{self.directory}: {refusal}; choose another directory for the export")
        self.staging.mkdir()

    def refusal(self, source: Path, adapter: Path | None = None) -> str | None:
        """Return the reason why the directory must not be replaced, or None if it may be replaced.

        The directory may be replaced if it does not exist, is empty, or contains only an earlier export.
        """
        for key, read in {"model.path": source, "adapter.path": adapter}.items():
            if read is not None and self.directory == read.resolve():
                return f"is {key} itself"
        try:
            stranger = self._stranger()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return stranger and f"is occupied by {stranger}, which was not written by an export"

    def _stranger(self) -> str | None:
        """Return the name of a file or folder in the target directory that no export of the engine wrote.

        Return None if there is no such entry. If the target is not a directory, return ``a regular file``. Files of
        the configuration and of the tokenizer are recognized by their names alone.
        """
        if self.directory.exists() and not self.directory.is_dir():
            return "a regular file"
        known = {"config.json", ADAPTER_CONFIG, INDEX, GENERATION, *PROCESSOR_FILES, *TOKENIZER_FILES}
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

        shares   what each rank has written
        files    other files of the export: maps each name to the content or to the file to copy
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
        self._replace(files)

    def publish_single(self, shares: list[Share], name: str, files: Files) -> None:
        """Join the shard files into the single file ``name``, add the other files, and publish the directory.

        shares, files   as for :meth:`publish`
        """
        written = sorted({file for share in shares for file in share.files.values()})
        join_files([self.staging / file for file in written], self.staging / name)
        for file in written:
            (self.staging / file).unlink()
        self._replace(files)

    def _replace(self, files: Files) -> None:
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
        """Return ``work()``. Convert errors such as a full disk or a missing permission to an error of the engine.

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
