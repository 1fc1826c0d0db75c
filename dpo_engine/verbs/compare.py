"""``dpo-engine compare``: compare two evaluations pair by pair, without a model."""

from pathlib import Path
from typing import Any

from dpo_engine.reporting import comparison
from dpo_engine.reporting.pair_file import read_evaluation


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Join two files that ``evaluate`` or ``train`` wrote, by pair; differences are first minus second.

    Returns  what :func:`~dpo_engine.reporting.comparison.compare` returns

    Raises :class:`~dpo_engine.errors.DataError` for a file that is not an evaluation, or without a common pair.
    """
    evaluations = (read_evaluation(path) for path in (first, second))
    return comparison.compare(*evaluations, names=(str(first), str(second)))
