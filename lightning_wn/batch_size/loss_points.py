"""Logged losses and logged noise scales joined by step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from lightning_wn.batch_size.forecast import LossPoint


def loss_points(
    history: Mapping[str, Sequence[float]],
    loss_steps: Sequence[float],
    losses: Sequence[float],
    *,
    prefix: str = "gns",
) -> list[LossPoint]:
    """Give each logged noise scale the mean of the losses that were logged since the one before.

    Args:
        history: ``"step"``, ``"<prefix>/noise_scale"`` and the ends of its interval, equally long.
        loss_steps: Steps at which losses were logged, in order; Lightning counts both alike.
        losses: The losses.
        prefix: Start of the logged keys.

    Returns:
        A point for each noise scale that has a finite interval and a loss, in the order of training.

    Example:
        >>> history = {"step": [4, 9], "gns/noise_scale": [50, 60], "gns/noise_scale_lower": [40, 50],
        ...            "gns/noise_scale_upper": [60, 70]}
        >>> [point.loss for point in loss_points(history, [3, 4, 8, 9], [3.0, 2.0, 2.0, 1.0])]
        [2.5, 1.5]
    """
    columns = [history[f"{prefix}/noise_scale{end}"] for end in ("", "_lower", "_upper")]
    points = []
    start = 0
    for step, noise_scale, lower, upper in zip(history["step"], *columns, strict=True):
        end = bisect_right(loss_steps, step)
        seen = [loss for loss in losses[start:end] if math.isfinite(loss)]
        start = max(start, end)
        if not seen or not 0 < lower <= noise_scale <= upper < math.inf:
            continue
        loss = sum(seen) / len(seen)
        if loss > 0:
            points.append(LossPoint(loss=loss, noise_scale=noise_scale, lower=lower, upper=upper))
    return points
