"""Thin a curve with too many points for the page, but keep its smallest and largest values."""

from __future__ import annotations

import numpy as np

MOST = 1200
"""Maximum number of points of a curve on the page."""


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points of a curve.

    The curve is divided into ranges with equal numbers of points. At most three points of each range are kept: the
    points with the smallest and the largest finite value, and the first point whose value is not finite. The first and
    the last point of the curve are always kept.
    """
    count = len(values)
    if count <= most:
        return steps, values
    finite = np.isfinite(values)
    edges = np.linspace(0, count, max(1, (most - 2) // 3) + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        part = values[start:stop]
        whole = finite[start:stop]
        if whole.any():
            kept |= {start + int(np.nanargmin(np.where(whole, part, np.nan)))}
            kept |= {start + int(np.nanargmax(np.where(whole, part, np.nan)))}
        if not whole.all():
            kept.add(start + int(np.argmin(whole)))  # a gap stays visible
    places = np.array(sorted(kept))
    return steps[places], values[places]
