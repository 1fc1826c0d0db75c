"""Write token pairs to an Arrow file. The file gets its final name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_engine.atomic_files import STALE_S, sync
from dpo_engine.data.dataset import DIGEST_BYTES, MASKS, NUMBERS, PARTS, ROWS, SCHEMA, TokenPair, add_content, ids_key


class Full(Exception):
    """A :class:`PairWriter` has reached its maximum number of pairs."""


class PairWriter:
    """Write pairs to an Arrow file, atomically: the file gets its final name only when it is complete and on disk.

    limit  maximum number of pairs; None means no limit

    Use as a context manager. If the block ends without :meth:`finish`, for example because of an error, the new file is
    removed, and an earlier file at `path` stays unchanged. At most `ROWS` pairs are held in memory.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.path = path
        self.limit = limit
        self.count = 0
        self._rows: list[TokenPair] = []
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._content = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._finished = False

    def __enter__(self) -> PairWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.path)
        self._temporary = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        self._temporary.unlink(missing_ok=True)
        self._stream = self._temporary.open("xb")  # "x": never write through an existing link
        self._writer = pa.ipc.new_file(self._stream, SCHEMA)
        return self

    def add(self, pair: TokenPair) -> None:
        """Append a pair. Raises :class:`Full` if there are already `limit` pairs."""
        if self.count == self.limit:
            raise Full
        self._rows.append(pair)
        self.count += 1
        facts = np.array([pair.weight, pair.source, *(getattr(pair, name) for name in NUMBERS)], dtype="<f8")
        self._digest.update(bytes.fromhex(pair.digest) + facts.tobytes())
        if len(self._rows) == ROWS:
            self._flush()

    def finish(self, facts: dict[str, Any]) -> None:
        """Complete the file and give it its final name. `facts` can be read back as :attr:`PairDataset.facts`."""
        if self._rows:
            self._flush()
        # The facts are known only at the end. A final batch without rows holds them, so that a single file is enough.
        metadata = {"facts": json.dumps(facts), "digest": self._digest.hexdigest()}
        for text in metadata.values():
            self._content.update(text.encode())
        metadata["content"] = self._content.hexdigest()
        self._writer.write_batch(pa.RecordBatch.from_pylist([], schema=SCHEMA), custom_metadata=metadata)
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._temporary, self.path)
        sync(self.path.parent)
        self._finished = True

    def __exit__(self, *error: object) -> None:
        if not self._finished:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        columns: list[pa.Array] = []
        for name, dtype in (*dict.fromkeys(PARTS, np.int32).items(), *dict.fromkeys(MASKS, np.uint8).items()):
            values = [np.asarray([] if getattr(row, name) is None else getattr(row, name), dtype=dtype) for row in rows]
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
            columns.append(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values))))
        columns += [
            pa.array([row.weight for row in rows], pa.float64()),
            pa.array([row.source for row in rows], pa.int32()),
            pa.array([bytes.fromhex(row.digest) for row in rows], pa.binary(DIGEST_BYTES)),
            pa.array([ids_key(row.prompt) for row in rows], pa.int64()),
            pa.array([row.prompt_text for row in rows], pa.int64()),
            pa.array([row.line for row in rows], pa.int64()),
            *(pa.array([getattr(row, name) for row in rows], pa.float64()) for name in NUMBERS),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
        add_content(self._content, batch)
        self._writer.write_batch(batch)


def _remove_stale(path: Path) -> None:
    """Remove temporary files that were last modified more than `STALE_S` seconds ago.

    Only killed writers leave such files, because a running writer modifies its file again before this time has passed.
    """
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()
        except FileNotFoundError:
            pass  # another process removed or renamed the file
