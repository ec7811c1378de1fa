"""Fewer points of long series, with every peak and every dip kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def downsample(history: Mapping[str, Sequence[float]], max_points: int) -> dict[str, list[float]]:
    """Keep at most so many points of equally long series, among them each stretch's extremes.

    The points are cut into stretches of equal length. Of each stretch those rows stay at which one of the series is
    smallest or largest, and one at which it is not finite; so no outlier is lost, and a line through what is left
    covers what the whole line covered.

    Args:
        history: Equally long series by key; ``"step"`` rises, so its extremes are the ends of the stretch.
        max_points: At least 3 for each series.

    Raises:
        ValueError: If ``max_points`` is too small for one stretch.
    """
    length = len(next(iter(history.values()), ()))
    if length <= max_points:
        return {key: list(values) for key, values in history.items()}
    # two ends, and of each other series two extremes and one value that is not finite
    per_stretch = 2 + 3 * (len(history) - 1)
    if max_points < per_stretch:
        raise ValueError(
            f"`max_points` must be at least {per_stretch} for {len(history)} series, got {max_points}; keep more."
        )
    stretches = max_points // per_stretch
    kept: set[int] = set()
    for i in range(stretches):
        rows = range(i * length // stretches, (i + 1) * length // stretches)
        kept |= {rows[0], rows[-1]}
        for values in history.values():
            finite = [row for row in rows if math.isfinite(values[row])]
            if finite:
                kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            if len(finite) < len(rows):
                kept.add(next(row for row in rows if not math.isfinite(values[row])))
    order = sorted(kept)
    return {key: [values[row] for row in order] for key, values in history.items()}
