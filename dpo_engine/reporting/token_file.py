"""Write and read a Parquet file with the tokens of selected pairs and the log-probability of each response token.

The file has one row per prompt and one row per response.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dpo_engine.errors import DataError, shorten
from dpo_engine.reporting.pair_file import write_file
from dpo_engine.strict_json import parse_object

FORMAT = 1
KEY = b"dpo_engine.tokens"
SUFFIX = ".tokens.parquet"
SIDES = ("prompt", "chosen", "rejected")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("index", pa.int64()),
        ("shown", pa.string()),
        ("side", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.list_(pa.string())),
        ("logps", pa.list_(pa.float32())),
        ("ref_logps", pa.list_(pa.float32())),
        ("scored", pa.list_(pa.bool_())),
        ("cut", pa.string()),
    ]
)


@dataclass(frozen=True)
class TokenText:
    """The tokens of a prompt or of a response.

    id         the pair's id, as in the evaluation
    index      position of the pair in the held-out set
    shown      why the pair was selected; see :mod:`~dpo_engine.reporting.shown_pairs`
    side       one of `SIDES`
    token_ids  the tokens
    text       the text of each token; for a prompt, a single text
    logps, ref_logps   log-probability in nats of each token of a response; nan for a token that is not scored. For a
               prompt, ``logps`` is empty and ``ref_logps`` is None. For a response, ``ref_logps`` is None if the
               log-probabilities under the reference are not known
    scored     whether each token of a response is scored; empty for a prompt
    cut        text that was cut from the start of a prompt; empty if nothing was cut; None if the text is not known
    """

    id: str
    index: int
    shown: str
    side: str
    token_ids: Sequence[int]
    text: Sequence[str]
    logps: Sequence[float] = ()
    ref_logps: Sequence[float] | None = None
    scored: Sequence[bool] = ()
    cut: str | None = ""


def tokens_path(evaluation: Path) -> Path:
    """Return the path of the token file that belongs to an evaluation's Parquet file."""
    return evaluation.with_name(evaluation.name.removesuffix(".parquet") + SUFFIX)


def write_tokens(path: Path, texts: Sequence[TokenText], facts: dict[str, Any]) -> None:
    """Write the tokens of pairs to a Parquet file, atomically.

    facts  facts of the evaluation; see :class:`~dpo_engine.reporting.pair_file.Evaluation`

    Raises :class:`~dpo_engine.errors.ConfigError` if the file cannot be written.
    """
    columns = [pa.array([_plain(getattr(text, field.name)) for text in texts], field.type) for field in SCHEMA]
    metadata = {KEY: json.dumps({"format": FORMAT, **facts})}
    table = pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata))
    content = io.BytesIO()
    pa.parquet.write_table(table, content, compression="zstd")
    write_file(path, content.getbuffer())


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    # Text from a tokenizer can contain unpaired surrogates, which UTF-8 cannot encode.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def read_tokens(path: Path) -> tuple[list[TokenText], dict[str, Any]]:
    """Read the tokens of pairs, and the facts of their evaluation.

    Raises :class:`~dpo_engine.errors.DataError` if the file is missing, damaged, or not a token file of this format.
    """
    try:
        table = pa.parquet.read_table(path)
        facts = parse_object((table.schema.metadata or {})[KEY])
        wrong = facts.pop("format") != FORMAT or not table.schema.equals(SCHEMA)
    except (pa.ArrowException, OSError, EOFError, KeyError, ValueError) as error:
        what = shorten(re.split(r"[.:;] ", f"{error}".splitlines()[0])[0].rstrip("."), 80)
        raise DataError(f"{path}: is not a readable token file ({what}); run the evaluation again") from error
    if wrong:
        raise DataError(f"{path}: has a format that this version of dpo-engine does not read; run the evaluation again")
    return [TokenText(**row) for row in table.to_pylist()], facts
