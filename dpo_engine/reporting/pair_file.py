"""What an evaluation found, pair by pair: a Parquet file that says which checkpoint, loss and data it is of."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dpo_engine.atomic_files import write_whole
from dpo_engine.errors import ConfigError, DataError, shorten
from dpo_engine.strict_json import parse_object

FORMAT = 1
KEY = b"dpo_engine.evaluation"
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
NUMBERS = (
    "weight",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "margin",
    "accuracy",
    "loss",
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("index", pa.int64()),
        ("weight", pa.float64()),
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("chosen_logps", pa.float64()),
        ("rejected_logps", pa.float64()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("chosen_rewards", pa.float64()),
        ("rejected_rewards", pa.float64()),
        ("margin", pa.float64()),
        ("accuracy", pa.float64()),
        ("loss", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Evaluation:
    """Held-out pairs under one policy.

    facts    of the run: `step`, `model`, `loss` with its options, `reference` or None, `dtype`, `data` (a digest of all
             pairs), `engine` (its version)
    columns  [n] each, those of `SCHEMA`, a row for each pair in the order of the held-out set. `id` and `prompt_id` are
             hashes of token ids; log-probabilities are in nats, those of a reference nan where there is none
    """

    facts: dict[str, Any]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["id"])

    def not_finite(self) -> int:
        """Pairs with a number that is not finite, a reference's aside."""
        return int((~np.isfinite([self.columns[name] for name in NUMBERS]).all(0)).sum())


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write the pairs to a Parquet file, which appears whole or not at all. Raises :class:`ConfigError`."""
    arrays = [
        pa.array(evaluation.columns[field.name], field.type, from_pandas=field.name in REFERENCE) for field in SCHEMA
    ]
    metadata = {KEY: json.dumps({"format": FORMAT, **evaluation.facts})}
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata))
    content = io.BytesIO()
    pa.parquet.write_table(table, content)
    _write(path, content.getbuffer())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a JSON file, which appears whole or not at all. Raises :class:`ConfigError`."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    _write(path, text.encode())


def _write(path: Path, content: bytes | memoryview) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); give another place") from error


def read_evaluation(path: str | Path) -> Evaluation:
    """An evaluation from its file. Raises :class:`DataError` for a file that is absent, damaged, or none of ours."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give one that `dpo-engine eval` or `train` wrote")
    try:
        table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError, EOFError) as error:
        what = re.split(r"[.:;] ", str(error).splitlines()[0])[0].rstrip(".")
        raise DataError(f"{path}: cannot be read as Parquet ({shorten(what, 80)}); is the file whole?") from error
    try:
        facts = parse_object((table.schema.metadata or {})[KEY])
        version = facts.pop("format")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: is no evaluation; give a file that `dpo-engine eval` or `train` wrote") from error
    if version != FORMAT:
        raise DataError(f"{path}: format {version}, and this version reads {FORMAT}; evaluate again with this version")
    if not table.schema.equals(SCHEMA) or not len(table):
        raise DataError(f"{path}: its columns are not those of an evaluation; evaluate again")
    found = Evaluation(facts, {name: table[name].to_numpy() for name in table.column_names})
    if wrong := found.not_finite():
        raise DataError(f"{path}: {wrong} of {len(found)} pairs have numbers that are not finite; nothing to compare")
    return found
