"""Write and read evaluation results: a Parquet file with one row per pair, and run information in its metadata."""

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
    """Results of one policy on the held-out pairs.

    facts    information about the run: `step`, `model`, `loss` with its options, `reference` (None if the run has no
             reference), `dtype`, `data` (a digest of the evaluated pairs), and `engine` (the engine's version)
    columns  the columns of `SCHEMA`, [n] each, with one row per pair in the order of the held-out set. `id` and
             `prompt_id` are hashes of token ids. Log-probabilities are in nats. Without a reference, the columns
             `ref_chosen_logps` and `ref_rejected_logps` contain nan
    """

    facts: dict[str, Any]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["id"])

    def not_finite(self) -> int:
        """Return the number of pairs with a non-finite value, ignoring the reference's columns."""
        return int((~np.isfinite([self.columns[name] for name in NUMBERS]).all(0)).sum())


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation to a Parquet file, atomically. Raises :class:`ConfigError` if the file cannot be written."""
    arrays = [
        pa.array(evaluation.columns[field.name], field.type, from_pandas=field.name in REFERENCE) for field in SCHEMA
    ]
    metadata = {KEY: json.dumps({"format": FORMAT, **evaluation.facts})}
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata))
    content = io.BytesIO()
    pa.parquet.write_table(table, content)
    write_file(path, content.getbuffer())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a JSON file, atomically. Raises :class:`ConfigError` if the file cannot be written."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, text.encode())


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, and create its directory. Raises :class:`ConfigError` if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error


def read_evaluation(path: str | Path) -> Evaluation:
    """Read an evaluation from a Parquet file.

    Raises :class:`DataError` if the file is missing, damaged, empty or in another format, or if a column other than the
    reference's columns contains non-finite values.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give a file written by `dpo-engine eval` or `train`")
    try:
        table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError, EOFError) as error:
        what = re.split(r"[.:;] ", str(error).splitlines()[0])[0].rstrip(".")
        raise DataError(
            f"{path}: cannot be read as Parquet ({shorten(what, 80)}); check that the file is complete"
        ) from error
    try:
        facts = parse_object((table.schema.metadata or {})[KEY])
        version = facts.pop("format")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: is not an evaluation; give a file written by `dpo-engine eval` or `train`") from error
    if version != FORMAT:
        raise DataError(
            f"{path}: has format {version}, but this version of dpo-engine reads format {FORMAT}; run the evaluation "
            "again"
        )
    if not table.schema.equals(SCHEMA) or not len(table):
        raise DataError(f"{path}: is empty or has the wrong columns; run the evaluation again")
    found = Evaluation(facts, {name: table[name].to_numpy() for name in table.column_names})
    if wrong := found.not_finite():
        raise DataError(
            f"{path}: values are not finite in {wrong} of {len(found)} pairs, so the evaluation cannot be compared"
        )
    return found
