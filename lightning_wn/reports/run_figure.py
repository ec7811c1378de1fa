"""One figure for a run: its noise scale, what that is made of, and what other batch sizes would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_wn.batch_size.advice import BatchSizeAdvice
from lightning_wn.batch_size.tradeoff import efficiency
from lightning_wn.noise_scale.drawing import BATCH_SIZE_COLOR, GRID_COLOR, NOISE_SCALE_COLOR, import_pyplot, seen_on
from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.reports.noise_scale_figure import SUGGESTION_COLOR, draw_history, draw_tradeoff, logged_series
from lightning_wn.text import format_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRACE_COLOR = "#CC79A7"  # the reddish purple of the palette in noise_scale/drawing.py
_DARK = {
    "figure.facecolor": "#15181c",
    "savefig.facecolor": "#15181c",
    "axes.facecolor": "#15181c",
    "text.color": "#e6e6e6",
    "axes.labelcolor": "#e6e6e6",
    "axes.edgecolor": "#9aa0a6",
    "xtick.color": "#c8ccd0",
    "ytick.color": "#c8ccd0",
}


def plot_run(
    history: Mapping[str, Sequence[float]],
    advice: BatchSizeAdvice,
    *,
    prefix: str = "gns",
    theme: Literal["light", "dark"] = "light",
) -> Figure:
    r"""Draw a run in four panels.

    Above: the noise scale with its interval and the batch size in use, and what it is the ratio of, \|G\|² and tr(Σ),
    each over optimizer steps. Below: the curve of all batch sizes, steps against examples, with the present one and
    the suggested one; and the share of the examples that each batch size really needs (statistical efficiency), with
    the goodput where the run's times are known.

    Args:
        history: As for :func:`~lightning_wn.reports.plot_noise_scale`, and ``"<prefix>/grad_sq_norm"`` and
            ``"<prefix>/cov_trace"`` with it.
        advice: What ``GradientNoiseScaleCallback.advise()`` returns.
        prefix: Start of the logged keys.
        theme: ``"dark"`` is for a dark page; ``"light"`` takes matplotlib's own settings.

    Returns:
        A matplotlib figure.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If ``theme`` is another, or as in ``plot_noise_scale``.
    """
    if theme not in ("light", "dark"):
        raise ValueError(f"`theme` must be 'light' or 'dark', got {theme!r}.")
    plt = import_pyplot()
    figure: Figure
    with plt.rc_context(_DARK if theme == "dark" else {}):
        figure, axes = plt.subplots(2, 2, figsize=(11.5, 9.0), layout="constrained")
        draw_history(axes[0, 0], history, prefix=prefix, unit=advice.estimate.unit)
        axes[0, 0].set_title("Gradient noise scale", fontsize=11)
        draw_moments(axes[0, 1], history, prefix=prefix)
        draw_tradeoff(axes[1, 0], advice.estimate, advice.suggested_batch_size)
        draw_efficiency(axes[1, 1], advice)
    return figure


def draw_moments(ax: Any, history: Mapping[str, Sequence[float]], *, prefix: str = "gns") -> None:
    r"""Draw \|G\|² and tr(Σ) over steps, each on an axis of its own; values that are not positive leave a gap."""
    steps, *series = logged_series(history, prefix, ("grad_sq_norm", "cov_trace"))
    names = ("|G|²", "tr(Σ)")
    colors = (seen_on(ax, NOISE_SCALE_COLOR), seen_on(ax, _TRACE_COLOR))
    styles = ("-", "--")
    sides = (ax, ax.twinx())
    lines = []
    for side, logged, name, color, style in zip(sides, series, names, colors, styles, strict=True):
        values = [value if value > 0 else math.nan for value in logged]
        mark = {"marker": "o"} if len(steps) == 1 else {}
        lines += side.plot(steps, values, color=color, linestyle=style, linewidth=2, label=name, **mark)
        side.set_ylabel(f"{name} ({'solid' if style == '-' else 'dashed'})")
        positive = [value for value in values if value > 0]
        # less than a decade reads better on a plain axis
        if positive and max(positive) > 10 * min(positive):
            side.set_yscale("log")
    ax.set_title("What it is the ratio of: tr(Σ) over |G|²", fontsize=11)
    ax.set_xlabel("optimizer step")
    ax.grid(visible=True, color=GRID_COLOR, linewidth=0.8)
    # on the axis that is drawn last, so that no line runs through it
    sides[1].legend(handles=lines, framealpha=0.85, edgecolor="none", loc="lower right")


def draw_efficiency(ax: Any, advice: BatchSizeAdvice) -> None:
    """Draw E_min/E over the batch size with its band, the candidates as dots on it, and the goodput where known."""
    estimate, unit = advice.estimate, advice.estimate.unit
    ax.set_title("Share of the examples that is really needed", fontsize=11)
    ax.set_xlabel(f"batch size ({unit})")
    ax.set_ylabel("efficiency")
    ax.set_ylim(0, 1.05)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.grid(visible=True, color=GRID_COLOR, linewidth=0.8)
    ax.set_axisbelow(True)
    if not advice.candidates:
        ax.text(0.5, 0.5, "the noise scale is not known yet", ha="center", va="center", transform=ax.transAxes)
        return
    color = seen_on(ax, NOISE_SCALE_COLOR)
    sizes = [candidate.batch_size for candidate in advice.candidates]
    start, end = 0.8 * sizes[0], 1.25 * sizes[-1]
    fine = [start * (end / start) ** (i / 200) for i in range(201)]
    ax.fill_between(
        fine,
        [efficiency(size, estimate.lower) for size in fine],
        [efficiency(size, estimate.upper) for size in fine],
        color=color, alpha=0.2, linewidth=0, label="its interval",
    )  # fmt: skip
    ax.plot(fine, [efficiency(size, estimate.noise_scale) for size in fine], color=color, linewidth=2,
            label="efficiency")  # fmt: skip
    ax.plot(sizes, [c.efficiency.value for c in advice.candidates], "o", color=color, markersize=5)
    goodputs = [candidate.goodput for candidate in advice.candidates if candidate.goodput is not None]
    if goodputs and max(goodputs) > 0:
        shares = [goodput / max(goodputs) for goodput in goodputs]
        ax.plot(sizes, shares, ":", color=seen_on(ax, _TRACE_COLOR), linewidth=2, marker=".",
                label="goodput by accumulation, over the best")  # fmt: skip
    for size, name, own in _marks(estimate, advice.suggested_batch_size):
        ax.axvline(size, color=seen_on(ax, own), linewidth=1.5, linestyle="--", label=f"{name}: {format_count(size)}")
    ax.set_xscale("log")
    ax.set_xlim(start, end)
    ax.set_xticks(_spread(sizes), [format_count(size) for size in _spread(sizes)])
    ax.minorticks_off()
    ax.legend(framealpha=0.85, edgecolor="none", fontsize=9, loc="lower left")


def _marks(estimate: NoiseScaleEstimate, suggested: float) -> list[tuple[float, str, str]]:
    if suggested == estimate.batch_size:
        return [(suggested, "now, and suggested", BATCH_SIZE_COLOR)]
    return [(estimate.batch_size, "now", BATCH_SIZE_COLOR), (suggested, "suggested", SUGGESTION_COLOR)]


def _spread(sizes: Sequence[float]) -> list[float]:
    """Return the sizes that can be written beside each other on a log axis."""
    spread: list[float] = []
    for size in sizes:
        if not spread or size >= 1.6 * spread[-1]:
            spread.append(size)
    return spread
