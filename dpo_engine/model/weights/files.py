"""A Hugging Face checkpoint as files: safetensors read by slice, and compared with what an architecture needs."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from dpo_engine.errors import ConfigError, printable, quoted, shorten
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.blocks import expected_tensors
from dpo_engine.strict_json import BadJson, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ROWS = 4096
"""Of a tensor, in memory at once when it is compared or hashed."""
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors that old checkpoints hold although they follow from ``config.json``."""


PICKLED = (b"PK\x03\x04", b"\x80")
"""How files of `torch.save`, new and old, begin."""
PICKLED_WEIGHTS = (
    "pickled weights can run code when read, so they are refused; convert them where you trust them, with "
    "save_pretrained of transformers"
)
MAX_HEADER_BYTES = 16 * 2**20
"""Of a safetensors file: about 100 bytes for each tensor."""


class Header(NamedTuple):
    """What a safetensors file says of one tensor: which file, its shape, and the file format's name of its dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class CheckpointFiles:
    """The tensors of the safetensors checkpoint in ``directory``.

    key   the configuration key that named the directory, for messages

    Only the files of the latest request stay open. Raises :class:`~dpo_engine.errors.ConfigError` when the weights are
    missing, pickled, or not what their index says.
    """

    def __init__(self, directory: str | Path, key: str = "model.path"):
        self.directory = Path(directory)
        self.where = f"{key}={directory}"
        self._open: dict[str, Any] = {}
        self.file_of: dict[str, str] = self._index()

    def fail(self, text: str) -> ConfigError:
        """The error that says ``text`` of this checkpoint."""
        return ConfigError(f"{self.where}: {text}")

    def _index(self) -> dict[str, str]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            weight_map = self._read_index(index)
            if single.is_file() and SINGLE not in weight_map.values():
                raise self.fail(f"holds {SINGLE} and also {INDEX}, which does not list it; remove the stale one")
            return weight_map
        if single.is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(kind))
        if pickled:
            raise self.fail(f"{pickled[0]}: {PICKLED_WEIGHTS}")
        raise self.fail(f"has neither {SINGLE} nor {INDEX}; give the directory of a Hugging Face checkpoint")

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            weight_map = read_object(index)["weight_map"]
            files = {str(name) for name in weight_map.values()}
        except (OSError, BadJson, KeyError, TypeError, AttributeError) as failure:
            why = f" ({failure})" if isinstance(failure, (OSError, BadJson)) else ": it has no weight_map"
            raise self.fail(f"{INDEX} cannot be read{why}; fetch it again") from None
        for name in sorted(files):
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
                raise self.fail(f"{INDEX} names {quoted(name)}; only safetensors files beside it are read")
            if not (self.directory / name).is_file():
                raise self.fail(f"{INDEX} names {name}, which is missing; fetch the checkpoint again")
        return weight_map

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._check_start(name)
                self._open[name] = safe_open(self.directory / name, "pt")
            except (OSError, RuntimeError, SafetensorError) as failure:  # RuntimeError: no memory to map it
                raise self.fail(f"{name} is damaged ({failure}); fetch it again") from None
        return self._open[name]

    def _check_start(self, name: str) -> None:
        """Refuse a header larger than any checkpoint's, as a pickle would have, before something is made of it."""
        with open(self.directory / name, "rb") as stream:
            start = stream.read(8)
        if int.from_bytes(start, "little") <= MAX_HEADER_BYTES:
            return
        if start.startswith(PICKLED):
            raise self.fail(f"{name}: {PICKLED_WEIGHTS}")
        raise self.fail(
            f"{name} is damaged (its header would be larger than {MAX_HEADER_BYTES >> 20} MiB); fetch it again"
        )

    def slices(self, names: Iterable[str]) -> list[Any]:
        """Lazy slices of the tensors ``names``: indexed like tensors, they read only what is asked for."""
        names = list(names)
        absent = next((name for name in names if name not in self.file_of), None)
        if absent is not None:
            raise self.fail(f"has no tensor {absent}; the checkpoint is incomplete, or config.json is not its own")
        files = {self.file_of[name] for name in names}
        self._open = {name: handle for name, handle in self._open.items() if name in files}
        try:
            return [self._file(self.file_of[name]).get_slice(name) for name in names]
        except SafetensorError as failure:
            raise self.fail(f"{INDEX} does not fit its files ({failure}); fetch the checkpoint again") from None

    def headers(self) -> dict[str, Header]:
        """Every tensor that the files hold, listed in the index or not; reads no weights."""
        found = {}
        for file in sorted(set(self.file_of.values())):
            self._open = {}
            handle = self._file(file)
            for name in handle.keys():  # noqa: SIM118  not a mapping
                part = handle.get_slice(name)
                found[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
        return found

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the tensor ``name`` is stored."""
        return DTYPES[self.slices([name])[0].get_dtype()]

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's name, dtype, shape and bits; reads it some rows at a time."""
        (part,) = self.slices([name])
        shape = part.get_shape()
        digest = hashlib.sha256(f"{name} {part.get_dtype()} {list(shape)}\n".encode())
        for at in range(0, shape[0], ROWS):
            digest.update(part[at : at + ROWS].contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same bits; reads both, some rows at a time."""
        left, right = self.slices([one, other])
        if left.get_shape() != right.get_shape() or left.get_dtype() != right.get_dtype():
            return False
        return all(
            torch.equal(left[at : at + ROWS], right[at : at + ROWS]) for at in range(0, left.get_shape()[0], ROWS)
        )


def check_tensors(files: CheckpointFiles, arch: Architecture) -> None:
    """Compare a checkpoint with the weight table: name, file, shape and dtype of every tensor, in both directions.

    A tied copy of the embedding may be stored as well if it is equal. Reads headers only, except for such a copy.

    Raises :class:`~dpo_engine.errors.ConfigError` with the problems of each kind, cut to the first few.
    """
    rules = FAMILIES[arch.model_type].rules
    headers = files.headers()
    if arch.num_layers > len(headers):
        raise files.fail(
            f"config.json says {arch.num_layers} layers and there are {len(headers)} tensors; fetch the checkpoint "
            "again, or correct config.json"
        )
    expected = {tensor.name: (tensor.shape, rule.parameter) for tensor, rule in expected_tensors(rules, arch)}
    copies = {
        rule.tensors[0]: next(original.tensors[0] for original in rules if original.parameter == rule.tied_to)
        for rule in rules
        if rule.tied_to and arch.tied_embeddings
    }
    displaced = [
        f"{INDEX} puts tensor {shorten(printable(name), 55)} into {file}, which does not hold it; fetch the checkpoint "
        "again"
        for name, file in files.file_of.items()
        if name not in headers or headers[name].file != file
    ]
    missing = [
        f"has no tensor {name}, for {parameter}; fetch the checkpoint again, or correct config.json"
        for name, (_, parameter) in expected.items()
        if name not in headers
    ]
    misfits = [
        f"tensor {name} in {headers[name].file} has shape {shorten(str(list(headers[name].shape)), 40)}, expected "
        f"{list(shape)}; config.json or the file is another model's"
        for name, (shape, _) in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    foreign = [
        f"tensor {name} in {headers[name].file} has dtype {headers[name].dtype}; give weights in bf16, fp16 or fp32"
        for name in expected.keys() & headers.keys()
        if headers[name].dtype not in DTYPES
    ]
    unused = [
        f"tensor {shorten(printable(name), 55)} in {header.file} belongs to no parameter of a {arch.model_type} model "
        "of this config.json; correct that, or remove the tensor"
        for name, header in headers.items()
        if name not in expected and name not in copies and not DERIVED.search(name)
    ]
    untied = [
        f"tensor {name} in {headers[name].file} differs from {original} although config.json ties them; set "
        "tie_word_embeddings to false there, or remove the tensor"
        for name, original in copies.items()
        if name in headers and original in headers and not displaced and not files.equal(name, original)
    ]
    problems = [
        f"{files.where}: {line}"
        for kind in (displaced, missing, misfits, sorted(foreign), unused, untied)
        for line in _few(kind)
    ]
    if problems:
        raise ConfigError(problems)


def _few(lines: Sequence[str], limit: int = 4) -> list[str]:
    more = [f"and {len(lines) - limit} more like the last one"] if len(lines) > limit else []
    return [*lines[:limit], *more]
