"""Store reference log-probabilities on disk, so that values computed in one layout can be used in every other layout.

A store is a directory with one folder for each reference. The folder's name has three parts: the digest of the model,
the dtype, and the layer implementation with its use of FP8. A folder contains segments, which are Arrow files that
never change. The name of a segment consists of a number and the SHA-256 of its content, so that damage is detected. To
add rows, a job adds a segment. Several jobs can add segments at the same time, because each segment is published with
one rename, and two segments with the same number but different content have different names. New segments are read in
the order of their names. If several segments contain the same pair, the values that were read first are used."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpo_engine.atomic_files import STALE_S, remove_unfinished, write_whole
from dpo_engine.errors import DataError, shorten

FORMAT = 1
DIGEST = "digest"
VALUES = ("chosen", "rejected", "chosen_shared", "rejected_shared")
SCHEMA = pa.schema([(DIGEST, pa.binary(16)), *((name, pa.float32()) for name in VALUES)])
SEGMENT = re.compile(r"(\d{8})-([0-9a-f]{64})\.arrow")
KEY = np.dtype("S16")


class Numerics(NamedTuple):
    """The properties that identify a reference. References with equal properties share stored log-probabilities.

    weights   digest of the reference's tensors and architecture; it does not depend on the path of the model
    dtype     dtype of the reference's weights and activations
    spec      layer implementation, and how it uses FP8
    """

    weights: str
    dtype: str
    spec: str

    @property
    def folder(self) -> str:
        """Name of the folder for this reference."""
        return f"{self.weights}-{self.dtype}-{self.spec}"


def keys(digests: np.ndarray) -> np.ndarray:
    """Convert pair digests [n, 2] int64 to sortable keys [n]."""
    return np.ascontiguousarray(digests, dtype="<i8").view(KEY).reshape(-1)


def find(sorted_keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index of each wanted key in ``sorted_keys``, [n]; -1 for a key that is absent."""
    if not len(sorted_keys):
        return np.full(len(wanted), -1)
    place = np.searchsorted(sorted_keys, wanted).clip(max=len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == wanted, place, -1)


class Rows(NamedTuple):
    """Log-probabilities by pair.

    keys    [n]                sorted and unique
    values  [n, len(VALUES)]   fp32, nats
    """

    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def empty(cls) -> "Rows":
        """Return a table without rows."""
        return cls(np.empty(0, KEY), np.empty((0, len(VALUES)), np.float32))

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Return the index of each key's row, [n]; -1 for a key that has no row."""
        return find(self.keys, wanted)

    def with_more(self, added_keys: np.ndarray, values: np.ndarray) -> "Rows":
        """Return these rows and the added rows. For a key that already has a row, the added row is ignored."""
        unique, first = np.unique(added_keys, return_index=True)  # `first`: the first occurrence of each key
        new = self.find(unique) < 0
        # Insert instead of sorting again: with thousands of segments, sorting once per segment would take minutes.
        places = np.searchsorted(self.keys, unique[new])
        return Rows(
            np.insert(self.keys, places, unique[new]), np.insert(self.values, places, values[first[new]], axis=0)
        )


class ReferenceStore:
    """The segments for one reference. An instance must be used by only one thread.

    rows      the rows that :meth:`read` has returned so far
    refused   names of segments that are not used, with the reason for each
    """

    def __init__(self, root: str | Path, numerics: Numerics):
        self.numerics = numerics
        self.folder = Path(root) / numerics.folder
        self.refused: dict[str, str] = {}
        self._read: set[str] = set()
        self.rows = Rows.empty()
        self._metadata = json.dumps({"format": FORMAT, **numerics._asdict()})

    def read(self, wanted: np.ndarray) -> Rows:
        """Return the stored rows for ``wanted``, including those from segments that were added since the last call.

        A segment that cannot be used, for example because it is damaged or belongs to another reference, is added to
        :attr:`refused` and otherwise ignored.

        wanted   sorted keys of pairs [n]; must be the same in every call

        Raises :class:`~dpo_engine.errors.DataError` if the store's folder cannot be read.
        """
        for name in sorted(self._segments() - self._read):
            self._read.add(name)
            problem, table = self._open(name)
            if problem:
                self.refused[name] = problem
                continue
            found = np.frombuffer(table[DIGEST].combine_chunks().buffers()[1], dtype=KEY, count=len(table))
            asked = find(wanted, found) >= 0
            values = np.stack([table[value].to_numpy() for value in VALUES], axis=1)
            self.rows = self.rows.with_more(found[asked], values[asked])
        return self.rows

    def _segments(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.folder) if SEGMENT.fullmatch(name)}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be read ({error.strerror}); fix this, or set another reference.store"
            ) from error

    def _open(self, name: str) -> tuple[str, pa.Table | None]:
        """Open a segment. Return a description of the problem and None, or an empty string and the segment's rows."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            return f"cannot be read ({error.strerror or error})", None
        if hashlib.sha256(content).hexdigest() != SEGMENT.fullmatch(name)[2]:
            return "is damaged: its SHA-256 differs from the one in its name", None
        try:
            table = pa.ipc.open_file(content).read_all()
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            return f"is not a valid Arrow file ({shorten(str(error).splitlines()[0], 80)})", None
        said = (table.schema.metadata or {}).get(b"reference", b"").decode(errors="replace")
        if said != self._metadata:
            return "belongs to another reference", None
        if table.schema.remove_metadata() != SCHEMA:
            return "has unexpected columns", None
        if not all(np.isfinite(table[value].to_numpy()).all() for value in VALUES):
            return "contains values that are not finite", None
        return "", table

    def append(self, digests: np.ndarray, values: np.ndarray) -> Path:
        """Add a segment, and return its path after it is on disk.

        digests  [n, 2] int64           hash of each pair
        values   [n, len(VALUES)] fp32  log-probabilities of each pair

        Raises :class:`~dpo_engine.errors.DataError` if the folder cannot be read or the segment cannot be written.
        """
        buffer = pa.py_buffer(np.ascontiguousarray(digests, dtype="<i8").tobytes())
        columns = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(digests), [None, buffer])]
        columns += [pa.array(np.ascontiguousarray(column), pa.float32()) for column in values.T]
        table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({"reference": self._metadata}))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
        numbers = [int(SEGMENT.fullmatch(name)[1]) for name in self._segments()]
        name = f"{max(numbers, default=0) + 1:08d}-{hashlib.sha256(content).hexdigest()}.arrow"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder, older_than_s=STALE_S)
            write_whole(self.folder / name, content)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written to ({error.strerror or error}); fix this, or set another "
                "reference.store"
            ) from error
        return self.folder / name

    def complaints(self) -> list[str]:
        """Return one line for each segment in :attr:`refused`."""
        return [
            f"{self.folder / name}: {reason}; its rows are not used, and the file can be removed"
            for name, reason in self.refused.items()
        ]
