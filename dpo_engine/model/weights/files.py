"""Read the safetensors files of a Hugging Face checkpoint by slice, and compare their tensors with an architecture."""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from dpo_engine.data.hub import model_directory
from dpo_engine.errors import ConfigError, printable, quoted, shorten
from dpo_engine.model.architecture import FAMILIES, Architecture, read_architecture, read_config_json
from dpo_engine.model.families.rule import expected_tensors
from dpo_engine.model.weights.fused import MAYBE, Place, places_of, written_as
from dpo_engine.strict_json import BadJson, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ROWS = 4096
"""When a tensor is compared or hashed, this many of its rows are read at a time, to limit memory."""
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
"""Matches the names of tensors that are ignored: rotary frequencies and masks, which old checkpoints contain."""


PICKLED = (b"PK\x03\x04", b"\x80")
"""First bytes of files written by `torch.save`, in its new format and in its old format."""
PICKLED_WEIGHTS = (
    "pickled weights are refused, because loading them can run code; if you trust them, convert them to safetensors "
    "with save_pretrained of transformers"
)
MAX_HEADER_BYTES = 16 * 2**20
"""Maximum size of a safetensors header, in bytes. A header has about 100 bytes per tensor."""


class Header(NamedTuple):
    """Header entry of one tensor: the name of its file, its shape, and the safetensors name of its dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class CheckpointFiles:
    """The tensors of the safetensors checkpoint in ``directory``, which can also be a Hub id.

    key   configuration key whose value is the directory, for error messages

    A tensor that contains all experts of a layer appears as one tensor per expert, as in the weight table. Quantized
    tensors of experts appear as bf16 (:mod:`~dpo_engine.model.weights.fused`).

    Only the files that the latest request needed stay open. Raises :class:`~dpo_engine.errors.ConfigError` if the
    weights are missing, pickled or damaged, or if the files do not match the index.
    """

    def __init__(self, directory: str | Path, key: str = "model.path"):
        self.directory = model_directory(directory, key)
        self.where = f"{key}={directory}"
        self._open: dict[str, Any] = {}
        self._stored: dict[str, str] = self._index()
        self._places = self._fused(key)
        divided = {name for place in self._places.values() for name in place.stored}
        self.file_of: dict[str, str] = {name: file for name, file in self._stored.items() if name not in divided}
        self.file_of |= {name: self._stored[place.stored[0]] for name, place in self._places.items()}

    def _fused(self, key: str) -> dict[str, Place]:
        if not (self.directory / "config.json").is_file() or not any(MAYBE.search(name) for name in self._stored):
            return {}
        return places_of(read_architecture(self.directory, key), self._stored)

    def fail(self, text: str) -> ConfigError:
        """Return an error about this checkpoint, for the caller to raise."""
        return ConfigError(f"{self.where}: {text}")

    def _index(self) -> dict[str, str]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            weight_map = self._read_index(index)
            if single.is_file() and SINGLE not in weight_map.values():
                raise self.fail(
                    f"has {SINGLE} and also {INDEX}, but the index does not list {SINGLE}; remove the one that is "
                    "out of date"
                )
            return weight_map
        if single.is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(kind))
        if pickled:
            raise self.fail(f"{pickled[0]}: {PICKLED_WEIGHTS}")
        raise self.fail(f"has neither {SINGLE} nor {INDEX}; set it to the directory of a Hugging Face checkpoint")

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            weight_map = read_object(index)["weight_map"]
            files = {str(name) for name in weight_map.values()}
        except (OSError, BadJson, KeyError, TypeError, AttributeError) as failure:
            why = f" ({failure})" if isinstance(failure, (OSError, BadJson)) else ": weight_map is missing or invalid"
            raise self.fail(f"{INDEX} cannot be read{why}; download it again") from None
        for name in sorted(files):
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
                raise self.fail(
                    f"{INDEX} lists {quoted(name)}, not a safetensors file in this directory; download "
                    "the checkpoint again"
                )
            if not (self.directory / name).is_file():
                raise self.fail(f"{INDEX} lists {name}, which is missing; download the checkpoint again")
        return weight_map

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._check_start(name)
                self._open[name] = safe_open(self.directory / name, "pt")
            # safe_open raises RuntimeError if there is not enough memory to map the file.
            except (OSError, RuntimeError, SafetensorError) as failure:
                raise self.fail(f"{name} cannot be read ({failure}); download it again") from None
        return self._open[name]

    def _check_start(self, name: str) -> None:
        """Reject a file whose header seems to be extremely large, before the header is parsed.

        Pickle files are rejected here too, because their first bytes, read as the size of a header, are a huge number.
        """
        with open(self.directory / name, "rb") as stream:
            start = stream.read(8)
        if int.from_bytes(start, "little") <= MAX_HEADER_BYTES:
            return
        if start.startswith(PICKLED):
            raise self.fail(f"{name}: {PICKLED_WEIGHTS}")
        raise self.fail(
            f"{name} is damaged (its header would be larger than {MAX_HEADER_BYTES >> 20} MiB); download it again"
        )

    def slices(self, names: Iterable[str]) -> list[Any]:
        """Return an object for each tensor in ``names``. Indexing it like a tensor reads only the selected part."""
        names = list(names)
        absent = next((name for name in names if name not in self.file_of), None)
        if absent is not None:
            raise self.fail(f"tensor {absent} is missing; download the checkpoint again, or correct config.json")
        stored = [self._places[name].stored if name in self._places else [name] for name in names]
        files = {self._stored[part] for parts in stored for part in parts}
        self._open = {name: handle for name, handle in self._open.items() if name in files}
        try:
            found = [[self._file(self._stored[part]).get_slice(part) for part in parts] for parts in stored]
        except SafetensorError as failure:
            raise self.fail(f"{INDEX} does not match the files ({failure}); download the checkpoint again") from None
        places = (self._places.get(name) for name in names)
        return [place.slices(parts) if place else parts[0] for place, parts in zip(places, found, strict=True)]

    def headers(self) -> dict[str, Header]:
        """Return the header entries of all tensors in the files, including tensors that the index does not list."""
        found = {}
        for file in sorted(set(self.file_of.values())):
            self._open = {}
            handle = self._file(file)
            for name in handle.keys():  # noqa: SIM118  the handle is not a dict and cannot be iterated
                part = handle.get_slice(name)
                found[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
        return self._divided(found) if self._places else found

    def _divided(self, found: dict[str, Header]) -> dict[str, Header]:
        """Replace the header of each fused tensor with headers of its parts, which are tensors of the weight table."""
        divided = {name for place in self._places.values() for name in place.stored}
        others = {name: header for name, header in found.items() if name not in divided}
        for name, place in self._places.items():
            if absent := [part for part in place.stored if part not in found]:
                raise self.fail(f"{INDEX} lists tensor {absent[0]}, which is in no file; download the checkpoint again")
            first, *scales = (found[part] for part in place.stored)
            shape = place.shape(first.shape)
            odd = [part for part in scales if part.shape != first.shape[:-1] or {part.dtype, first.dtype} != {"U8"}]
            if shape is None or odd:
                raise self.fail(
                    f"tensor {place.stored[0]} in {first.file} has shape {shorten(str(list(first.shape)), 40)} and "
                    f"dtype {first.dtype}, which do not fit {place.experts} experts"
                    + (f" or do not fit tensor {place.stored[1]}" if scales else "")
                    + "; config.json or the file belongs to another model; download both again"
                )
            others[name] = Header(first.file, shape, "BF16" if place.packed else first.dtype)
        return others

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor ``name`` is stored."""
        return DTYPES[self.slices([name])[0].get_dtype()]

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each tensor in the files; 0 for a dtype that the engine does not read."""
        return {
            name: math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else 0
            for name, (_, shape, dtype) in self.headers().items()
        }

    def digest(self, name: str) -> str:
        """Return the SHA-256 hash of a tensor's name, dtype, shape and bits."""
        (part,) = self.slices([name])
        shape = part.get_shape()
        digest = hashlib.sha256(f"{name} {part.get_dtype()} {list(shape)}\n".encode())
        for at in range(0, shape[0], ROWS):
            digest.update(part[at : at + ROWS].contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and values."""
        left, right = self.slices([one, other])
        if left.get_shape() != right.get_shape() or left.get_dtype() != right.get_dtype():
            return False
        return all(
            torch.equal(left[at : at + ROWS], right[at : at + ROWS]) for at in range(0, left.get_shape()[0], ROWS)
        )


def carried(arch: Architecture) -> tuple[str, ...]:
    """Return the name prefixes of tensors in model parts that the engine does not train, but copies to exports."""
    return getattr(FAMILIES[arch.model_type], "carried", ())


def check_tensors(files: CheckpointFiles, arch: Architecture) -> None:
    """Check the names, shapes, dtypes and files of a checkpoint's tensors.

    Names and shapes must agree with the weight table. The file of each tensor must be the one that the index lists. A
    missing tensor is an error. A tensor that no rule uses is an error too, with four exceptions: tensors whose names
    match `DERIVED`, tensors that are only copied to exports (:func:`carried`), tensors of layers for multi-token
    prediction (:mod:`~dpo_engine.model.weights.kept`) and, if the embeddings are tied, a stored copy of the embedding
    (`lm_head.weight`). This copy must equal the embedding. Only headers are read, except to compare these two tensors.

    Raises :class:`~dpo_engine.errors.ConfigError` with the first few problems of each kind.
    """
    rules = FAMILIES[arch.model_type].rules
    headers = files.headers()
    if arch.num_layers > len(headers):
        raise files.fail(
            f"config.json declares {arch.num_layers} layers, but the number of tensors is {len(headers)}; download the "
            "checkpoint again, or correct config.json"
        )
    expected = {tensor.name: (tensor.shape, rule.parameter) for tensor, rule in expected_tensors(rules, arch)}
    copies = {
        rule.tensors[0]: next(original.tensors[0] for original in rules if original.parameter == rule.tied_to)
        for rule in rules
        if rule.tied_to and arch.tied_embeddings
    }
    others = {name for name in headers if name.startswith(carried(arch))}
    read = {*expected, *others}
    displaced = [
        f"{INDEX} lists tensor {shorten(printable(name), 55)} in {file}, which does not contain it; download the "
        "checkpoint again"
        for name, file in files.file_of.items()
        if name not in headers or headers[name].file != file
    ]
    fused = written_as(arch)
    absent = {fused.get(name, name): parameter for name, (_, parameter) in expected.items() if name not in headers}
    missing = [
        f"tensor {name} is missing (for parameter {parameter}); download the checkpoint again, or correct config.json"
        for name, parameter in absent.items()
    ]
    misfits = [
        f"tensor {name} in {headers[name].file} has shape {shorten(str(list(headers[name].shape)), 40)}, expected "
        f"{list(shape)}; config.json or the file belongs to another model; download both again"
        for name, (shape, _) in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    foreign = [
        f"tensor {name} in {headers[name].file} has dtype {headers[name].dtype}; convert it to bf16, fp16 or fp32"
        for name in read & headers.keys()
        if headers[name].dtype not in DTYPES
    ]
    layers = range(arch.num_layers, arch.num_layers + kept_layers(files.directory))
    unused = [
        f"tensor {shorten(printable(name), 55)} in {header.file} is not used by a {arch.model_type} model with this "
        "config.json; correct config.json, or remove the tensor"
        for name, header in headers.items()
        if name not in read and name not in copies and not DERIVED.search(name) and layer_of(name) not in layers
    ]
    untied = [
        f"tensor {name} in {headers[name].file} differs from {original} although config.json ties them; set "
        "tie_word_embeddings to false in config.json, or remove the tensor"
        for name, original in copies.items()
        if name in headers and original in headers and not displaced and not files.equal(name, original)
    ]
    problems = [
        f"{files.where}: {line}"
        for kind in (displaced, missing, misfits, sorted(foreign), unused, untied)
        for line in first_few(kind)
    ]
    if problems:
        raise ConfigError(problems)


def layer_of(name: str) -> int | None:
    """Return the layer number N of a tensor name that starts with ``model.layers.N.``; None for other names."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def kept_layers(directory: str | Path) -> int:
    """Return the number of layers for multi-token prediction: ``num_nextn_predict_layers`` in ``config.json``."""
    count = read_config_json(directory).get("num_nextn_predict_layers", 0)
    return count if type(count) is int and count > 0 else 0


def first_few(lines: Sequence[str], limit: int = 4) -> list[str]:
    """Return the first lines and, if there are more lines, a line with the number of the others."""
    more = [f"and {len(lines) - limit} more like the last one"] if len(lines) > limit else []
    return [*lines[:limit], *more]
