"""``dpo-engine compare``: compare two evaluations pair by pair, without a model."""

from pathlib import Path
from typing import Any

from dpo_engine.reporting import comparison
from dpo_engine.reporting.pair_file import read_evaluation


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Compare two Parquet files written by ``evaluate`` or ``train``. Differences are first minus second.

    Returns  the result of :func:`~dpo_engine.reporting.comparison.compare`

    Raises :class:`~dpo_engine.errors.DataError` if a file is not an evaluation, or if no pair is in both files.
    """
    evaluations = (read_evaluation(path) for path in (first, second))
    return comparison.compare(*evaluations, names=(str(first), str(second)))
