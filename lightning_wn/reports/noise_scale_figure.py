"""Figures: the noise scale over training, and what a batch size costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.batch_size.tradeoff import examples_cost, steps_cost
from lightning_wn.noise_scale.drawing import BATCH_SIZE_COLOR, GRID_COLOR, draw_noise_scale, import_pyplot, seen_on
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.text import format_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUGGESTION_COLOR = "#009E73"  # the bluish green of the palette in noise_scale/drawing.py
_CURVE_COLOR = "0.5"  # readable on white and on black
_LARGEST_COST = 1000.0


def plot_noise_scale(
    history: Mapping[str, Sequence[float]], advice: BatchSizeAdvice | NoiseScaleEstimate, *, prefix: str = "gns"
) -> Figure:
    """Draw the noise scale over training beside the trade-off between steps and examples.

    Left: the noise scale with its interval over optimizer steps, and the batch size in use. Right: the curve
    of all batch sizes, S/S_min steps against E/E_min examples, both over the fewest possible, with the
    present batch size and the suggested one on it. A batch size is known but the noise scale only within its
    interval, so each stands on the curve as a dot on a stretch: where it lies if the noise scale is anywhere
    in the interval.

    Args:
        history: Logged values: ``"step"`` and ``"<prefix>/noise_scale"``, ``".../noise_scale_lower"``,
            ``".../noise_scale_upper"``, ``".../batch_size"``, equally long; as
            :func:`~lightning_wn.reports.read_csv_history` returns them.
        advice: What ``GradientNoiseScaleCallback.advise()`` or ``.estimate()`` returns; the latter draws no
            suggestion.
        prefix: Start of the logged keys.

    Returns:
        A matplotlib figure; ``figure.savefig("noise_scale.png")`` writes it.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; ``pip install "lightning-wn[plots]"`` brings it.
        ValueError: If ``history`` lacks a key or its series differ in length.
    """
    estimate = advice.estimate if isinstance(advice, BatchSizeAdvice) else advice
    figure: Figure
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(11.5, 4.7), layout="constrained")
    draw_history(left, history, prefix=prefix, unit=estimate.unit)
    left.set_title(f"Gradient noise scale during training (band: {_level(estimate)})", fontsize=11)
    draw_tradeoff(right, estimate, advice.suggested_batch_size if isinstance(advice, BatchSizeAdvice) else math.nan)
    return figure


def draw_history(ax: Any, history: Mapping[str, Sequence[float]], *, prefix: str, unit: str) -> None:
    """Draw the noise scale with its interval over steps, and the batch size in use."""
    names = ("noise_scale", "noise_scale_lower", "noise_scale_upper", "batch_size")
    draw_noise_scale(ax, *logged_series(history, prefix, names), unit=unit)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"noise scale and batch size ({unit})")


def draw_tradeoff(ax: Any, estimate: NoiseScaleEstimate, suggested_batch_size: float = math.nan) -> None:
    """Draw S/S_min against E/E_min with the present and the suggested batch size, NaN for none, on the curve."""
    present, unit = estimate.batch_size, estimate.unit
    marks = []
    if estimate.num_measurements:
        same = suggested_batch_size == present
        name = "you are here, and this is the suggestion" if same else "you are here"
        marks.append((present, name, BATCH_SIZE_COLOR, "o", 11.0))
        if math.isfinite(suggested_batch_size) and not same:
            marks.append((suggested_batch_size, "suggested", SUGGESTION_COLOR, "D", 5.0))
    # B/B_crit, the place on the curve, of everything that is drawn
    noise_scales = [x for x in (estimate.noise_scale, estimate.lower, estimate.upper) if 0 < x < math.inf]
    places = [size / noise_scale for size, *_ in marks for noise_scale in noise_scales]
    reach = min(max([9.0, *(1.6 * max(place, 1 / place) for place in places)]), _LARGEST_COST)
    # the stretches of unbounded intervals run on beyond the edge
    beyond = 10 * reach
    ax.plot(*_curve(1 / beyond, beyond), color=_CURVE_COLOR, linewidth=1.5, zorder=2)
    for size, name, own, marker, width in marks:
        color = seen_on(ax, own)
        label = f"{name}: {format_count(size)} {unit}"
        start, end = (_place(size, noise_scale, beyond) for noise_scale in (estimate.upper, estimate.lower))
        ax.plot(*_curve(start, end), color=color, alpha=0.4, linewidth=width, solid_capstyle="butt", zorder=2.5)
        # an infinite noise scale has a stretch and no place
        place = _place(size, estimate.noise_scale, reach) if math.isfinite(estimate.noise_scale) else math.nan
        point = [examples_cost(place, 1.0)], [steps_cost(place, 1.0)]
        ax.plot(*point, marker=marker, color=color, markersize=9, markeredgecolor="white", linestyle="",
                zorder=4, label=label)  # fmt: skip
    ax.plot([2], [2], marker="s", color=_CURVE_COLOR, markersize=5, linestyle="", zorder=3,
            label="batch size = noise scale: twice the fewest of both")  # fmt: skip
    _set_up_axes(ax, 1.1 * (1 + reach), estimate)


def _curve(start: float, end: float) -> tuple[list[float], list[float]]:
    """Return E/E_min and S/S_min where B/B_crit runs from ``start`` to ``end``, evenly on a log scale."""
    count = 400
    places = [start * (end / start) ** (i / count) for i in range(count + 1)]
    return [examples_cost(place, 1.0) for place in places], [steps_cost(place, 1.0) for place in places]


def _place(size: float, noise_scale: float, reach: float) -> float:
    """Return B/B_crit between 1/reach and reach; B_crit may be 0 or infinite."""
    place = size / noise_scale if noise_scale > 0 else math.inf
    return min(max(place, 1 / reach), reach)


def _set_up_axes(ax: Any, largest: float, estimate: NoiseScaleEstimate) -> None:
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= largest]
    if len(ticks) > 8:
        ticks = [tick for tick in ticks if tick != 1.5]
    labels = [f"{tick:,g}x" for tick in ticks]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    ax.minorticks_off()
    ax.set_xlim(0.93, largest)
    ax.set_ylim(0.93, largest)
    ax.set_xlabel(f"{estimate.unit} to the same loss, over the fewest possible")
    ax.set_ylabel("optimizer steps to the same loss,\nover the fewest possible")
    ax.set_title(f"What a batch size costs (stretch: {_level(estimate)})", fontsize=11)
    ax.text(0.985, 0.135, "larger batches →", transform=ax.transAxes, ha="right", color=_CURVE_COLOR, fontsize=9)
    ax.text(0.135, 0.975, "↑ smaller batches", transform=ax.transAxes, va="top", color=_CURVE_COLOR, fontsize=9)
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.9), frameon=False, fontsize=9)
    ax.grid(visible=True, color=GRID_COLOR, linewidth=0.8)
    ax.set_axisbelow(True)


def _level(estimate: NoiseScaleEstimate) -> str:
    return f"{estimate.confidence * 100:g} % interval"


def logged_series(history: Mapping[str, Sequence[float]], prefix: str, names: Sequence[str]) -> list[Sequence[float]]:
    """Return the steps and the series of these names.

    Raises:
        ValueError: If ``history`` lacks one, or they differ in length.
    """
    keys = ["step", *(f"{prefix}/{name}" for name in names)]
    missing = [key for key in keys if key not in history]
    if missing:
        raise ValueError(f"`history` lacks {missing}; `read_csv_history(logger.log_dir)` returns all that is needed.")
    series = [history[key] for key in keys]
    if len({len(values) for values in series}) != 1:
        raise ValueError(f"The series in `history` differ in length: {[len(values) for values in series]}.")
    return series
