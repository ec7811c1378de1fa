"""Logged losses and logged noise scales joined by step, and averaged over stretches of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median

from lightning_wn.batch_size.forecast import LossPoint

_STRETCHES = 12
# how far, as a logarithm, the truth may lie from an estimate whose interval says nothing
_UNKNOWN_REACH = 3.0

_Row = tuple[float, float, float, float]


def loss_points(
    history: Mapping[str, Sequence[float]],
    loss_steps: Sequence[float],
    losses: Sequence[float],
    *,
    prefix: str = "gns",
    stretches: int = _STRETCHES,
) -> list[LossPoint]:
    """Average a run over stretches of equal length, each with its loss and its noise scale.

    Each logged noise scale belongs to the mean of the losses that were logged since the one before. Logged estimates
    are moving averages, so that neighbours tell the same thing, and a logged loss is one batch's: few averages instead
    of many points make both honest. The two moments are averaged apart and divided last, in every stretch over all
    that was logged: a mean of ratios would be biased, and to leave out those whose interval is open would favour the
    small ones. The interval is as wide as a typical one of the stretch, judged by its lower end.

    Args:
        history: ``"step"``, ``"<prefix>/grad_sq_norm"``, ``".../cov_trace"`` and ``".../noise_scale_lower"``, equally
            long.
        loss_steps: Steps at which losses were logged, in order; Lightning counts both alike.
        losses: The losses.
        prefix: Start of the logged keys.
        stretches: At most so many points.

    Returns:
        A point for each stretch whose mean |G|² is above zero, in the order of training.

    Example:
        >>> history = {"step": [4, 9, 14, 19], "gns/grad_sq_norm": [0.1, 0.3, -0.1, 0.2],
        ...            "gns/cov_trace": [4.0, 4.0, 6.0, 6.0], "gns/noise_scale_lower": [20.0, 10.0, 30.0, 24.0]}
        >>> points = loss_points(history, [3, 4, 8, 9, 14, 19], [3.0, 2.0, 2.0, 1.0, 1.0, 1.0], stretches=2)
        >>> [(point.loss, round(point.noise_scale)) for point in points]
        [(2.0, 20), (1.0, 120)]
    """
    rows = list(_joined(history, loss_steps, losses, prefix))
    stretches = min(stretches, len(rows))
    cuts = [i * len(rows) // stretches for i in range(stretches + 1)] if rows else []
    points = (_pooled(rows[start:end]) for start, end in pairwise(cuts))
    return [point for point in points if point is not None]


def _joined(
    history: Mapping[str, Sequence[float]], loss_steps: Sequence[float], losses: Sequence[float], prefix: str
) -> Iterator[_Row]:
    """Yield loss, |G|², tr(Σ) and the lower end of the interval of each log step that has them."""
    columns = [history[f"{prefix}/{name}"] for name in ("grad_sq_norm", "cov_trace", "noise_scale_lower")]
    start = 0
    for step, grad_sq_norm, cov_trace, lower in zip(history["step"], *columns, strict=True):
        end = bisect_right(loss_steps, step)
        seen = [loss for loss in losses[start:end] if math.isfinite(loss)]
        start = max(start, end)
        if seen and math.isfinite(grad_sq_norm) and math.isfinite(cov_trace):
            yield fmean(seen), grad_sq_norm, cov_trace, lower


def _pooled(rows: Sequence[_Row]) -> LossPoint | None:
    loss, grad_sq_norm, cov_trace = (fmean(row[i] for row in rows) for i in range(3))
    if not (loss > 0.0 and grad_sq_norm > 0.0 and cov_trace > 0.0):
        return None
    noise_scale = cov_trace / grad_sq_norm
    reach = median(_reach(*row[1:]) for row in rows)
    return LossPoint(
        loss=loss,
        noise_scale=noise_scale,
        lower=noise_scale * math.exp(-reach),
        upper=noise_scale * math.exp(reach),
    )


def _reach(grad_sq_norm: float, cov_trace: float, lower: float) -> float:
    """Return how far below an estimate its interval reaches, as a logarithm."""
    if not (grad_sq_norm > 0.0 and cov_trace > 0.0 and 0.0 < lower < math.inf):
        return _UNKNOWN_REACH
    return max(math.log(cov_trace / grad_sq_norm / lower), 0.0)
