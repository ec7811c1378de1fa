"""Drawing a noise scale over training; matplotlib is imported only here and only when asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def figure_and_axis(ax: Any = None) -> tuple[Any, Any]:
    """Return (figure, axis): the given axis with its figure, or new ones.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415 - an optional dependency, needed for figures only
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Figures need matplotlib, which is not installed; run `pip install "lightning-wn[plots]"`.'
        ) from error
    return plt.subplots(layout="constrained") if ax is None else (ax.figure, ax)


def draw_noise_scale(  # noqa: PLR0917 - one series after the other, as they stand in the logs
    ax: Any,
    steps: Sequence[float],
    noise_scale: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    batch_size: Sequence[float],
    *,
    unit: str = "examples",
) -> None:
    """Draw the noise scale with its interval over steps, and the batch size in use, on a log axis.

    Args:
        ax: A matplotlib axis.
        steps: Abscissa, one value a point.
        noise_scale: Estimates; infinite ones leave a gap.
        lower: Lower ends of the interval.
        upper: Upper ends; where infinite, the band reaches the upper edge of the axis.
        batch_size: Batch size in use.
        unit: What is counted.
    """
    finite = [x for x in (*noise_scale, *lower, *upper, *batch_size) if math.isfinite(x) and x > 0]
    bottom, top = (min(finite), max(finite)) if finite else (1.0, 10.0)
    # a quarter of a decade of air, and no more than two decades below what is estimated
    bottom, top = bottom / 1.8, top * 1.8
    estimates = [x for x in (*noise_scale, *batch_size) if math.isfinite(x) and x > 0]
    if estimates:
        bottom = max(bottom, min(estimates) / 20)
        top = min(top, max(estimates) * 20)
    clip = [min(x, top) if x > bottom else bottom for x in upper], [max(x, bottom) for x in lower]
    ax.fill_between(steps, clip[1], clip[0], alpha=0.25, linewidth=0, color="tab:blue", label="its interval")
    gaps = [x if math.isfinite(x) else math.nan for x in noise_scale]
    alone = {"marker": "o"} if len(steps) == 1 else {}
    ax.plot(steps, gaps, color="tab:blue", label="noise scale", **alone)
    ax.plot(steps, batch_size, color="tab:orange", linestyle="--", label="batch size in use", **alone)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    ax.set_ylabel(unit)
    ax.legend(frameon=False)
