"""Drawing a noise scale over training; matplotlib is imported only here and only when asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NOISE_SCALE_COLOR = "#0072B2"
BATCH_SIZE_COLOR = "#D55E00"
"""Blue and vermillion of Okabe & Ito's palette: told apart by colour-blind readers too."""
_LIGHTER = 0.4
"""How much white goes into a colour on a dark ground."""
GRID_COLOR = (0.5, 0.5, 0.5, 0.22)
"""A thin grey that is quiet on white and on black."""


def import_pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415 - an optional dependency, needed for figures only
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Figures need matplotlib, which is not installed; run `pip install "lightning-wn[plots]"`.'
        ) from error
    return plt


def figure_and_axis(ax: Any = None) -> tuple[Any, Any]:
    """Return (figure, axis): the given axis with its figure, or new ones.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    plt = import_pyplot()
    return plt.subplots(layout="constrained") if ax is None else (ax.figure, ax)


def seen_on(ax: Any, color: str) -> Any:
    """Return a colour that shows on an axis: itself on a light ground, mixed with white on a dark one.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    from matplotlib.colors import to_rgb, to_rgba  # noqa: PLC0415 - optional, see above

    *ground, alpha = to_rgba(ax.get_facecolor())
    if alpha == 0.0:
        ground = list(to_rgb(ax.figure.get_facecolor()))
    if sum(ground) > 1.5:
        return color
    return tuple(part + _LIGHTER * (1.0 - part) for part in to_rgb(color))


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
    bottom, top = _limits(noise_scale, lower, upper, batch_size)
    band = [min(max(x, bottom), top) for x in lower], [min(max(x, bottom), top) for x in upper]
    # a single result is a dot with an error bar: a line or a band of no width would not show
    alone = len(steps) == 1
    color, size_color = seen_on(ax, NOISE_SCALE_COLOR), seen_on(ax, BATCH_SIZE_COLOR)
    mark = {"marker": "o"} if alone else {}
    if alone:
        ax.vlines(steps, *band, alpha=0.4, linewidth=6, color=color, label="its interval")
    else:
        ax.fill_between(steps, *band, alpha=0.2, linewidth=0, color=color, label="its interval")
    gaps = [x if math.isfinite(x) else math.nan for x in noise_scale]
    ax.plot(steps, gaps, color=color, linewidth=2, label="noise scale", **mark)
    ax.plot(steps, batch_size, color=size_color, linestyle="--", linewidth=2, label="batch size in use", **mark)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    ax.yaxis.set_major_locator(_plain_log_locator(ax.yaxis, bottom, top))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    ax.yaxis.minorticks_off()
    if alone:
        ax.set_xticks(list(steps))
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    ax.set_ylabel(unit)
    ax.grid(visible=True, color=GRID_COLOR, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False)


def _limits(
    noise_scale: Sequence[float], lower: Sequence[float], upper: Sequence[float], batch_size: Sequence[float]
) -> tuple[float, float]:
    """Choose the range of the axis: all that is finite, within a factor of 8 of what is estimated."""
    finite = [x for x in (*noise_scale, *lower, *upper, *batch_size) if math.isfinite(x) and x > 0]
    if not finite:
        return 1.0, 10.0
    estimates = [x for x in (*noise_scale, *batch_size) if math.isfinite(x) and x > 0] or finite
    bottom = max(min(finite) / 1.5, min(estimates) / 8)
    # air for the legend above
    top = min(max(finite) * 2.5, max(estimates) * 8)
    return bottom, top


def _plain_log_locator(axis: Any, bottom: float, top: float) -> Any:
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - optional, see above

    decades = math.log10(top / bottom)
    locator = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,))
    locator.set_axis(axis)
    return locator
