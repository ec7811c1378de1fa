"""Figures of a measured critical batch size."""

from __future__ import annotations

import math
from typing import Any

from lightning_wn.batch_size.measurement.measurement import CriticalBatchSizeMeasurement
from lightning_wn.batch_size.plots import SUGGESTION_COLOR
from lightning_wn.noise_scale.estimate import format_count
from lightning_wn.noise_scale.plotting import BATCH_SIZE_COLOR, GRID_COLOR, NOISE_SCALE_COLOR, figure_and_axis, seen_on

_POINTS = 200


def draw_measurement(measurement: CriticalBatchSizeMeasurement, ax: Any = None) -> Any:
    """Draw a measurement and return the figure; see ``CriticalBatchSizeMeasurement.plot``."""
    figure, ax = figure_and_axis(ax)
    if measurement.fit is None:
        _draw_excess(measurement, ax)
    else:
        _draw_steps(measurement, ax)
    _draw_critical(measurement, ax)
    ax.set_xscale("log", base=2)
    sizes = [row.batch_size for row in measurement.batch_sizes]
    ax.set_xticks(sizes, [format_count(size) for size in sizes])
    ax.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    ax.set_xlabel(f"batch size ({measurement.unit} in an optimizer step)")
    ax.grid(visible=True, color=GRID_COLOR, linewidth=0.8)
    ax.set_axisbelow(True)
    # the steps fall and the excess rises with the batch size
    ax.legend(frameon=False, fontsize=9, loc="upper left" if measurement.fit is None else "upper right")
    return figure


def _draw_steps(measurement: CriticalBatchSizeMeasurement, ax: Any) -> None:
    fit = measurement.fit
    assert fit is not None
    rows = [row for row in measurement.batch_sizes if math.isfinite(row.steps)]
    points = [row.mean_batch_size for row in rows], [row.steps for row in rows]
    ax.plot(*points, "o", color=seen_on(ax, NOISE_SCALE_COLOR), label="measured")
    low, high = rows[0].mean_batch_size / 1.5, rows[-1].mean_batch_size * 1.5
    sizes = [low * (high / low) ** (i / _POINTS) for i in range(_POINTS + 1)]
    ax.plot(sizes, [fit.steps(size) for size in sizes], color="0.5", linewidth=1.5, zorder=1,
            label=r"$S = S_{\min}\,(1 + B_{\mathrm{crit}}/B)$")  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylabel(f"optimizer steps to loss {measurement.target_loss:g}")


def _draw_excess(measurement: CriticalBatchSizeMeasurement, ax: Any) -> None:
    rows = [row for row in measurement.batch_sizes if math.isfinite(row.excess)]
    errors = [0.0 if math.isnan(row.excess_error) else row.excess_error for row in rows]
    ax.errorbar([row.batch_size for row in rows], [row.excess for row in rows], errors, fmt="o", capsize=3,
                color=seen_on(ax, NOISE_SCALE_COLOR), label="measured, ± standard error")  # fmt: skip
    ax.axhline(measurement.tolerance, color="0.5", linewidth=1.5, label=f"tolerance {measurement.tolerance:g}")
    ax.set_ylabel(f"loss above that at batch size {rows[0].batch_size}")


def _draw_critical(measurement: CriticalBatchSizeMeasurement, ax: Any) -> None:
    sizes = [row.batch_size for row in measurement.batch_sizes]
    low, high = sizes[0] / 1.5, sizes[-1] * 1.5
    if 0 < measurement.critical_batch_size < math.inf:
        name = f"critical batch size {format_count(measurement.critical_batch_size)}"
        ax.axvline(measurement.critical_batch_size, color=seen_on(ax, SUGGESTION_COLOR), linewidth=2, label=name)
    ends = [min(max(end, low), high) for end in (measurement.lower, measurement.upper)]
    ax.axvspan(*ends, color=seen_on(ax, SUGGESTION_COLOR), alpha=0.15, linewidth=0, zorder=0,
               label=f"its {measurement.confidence:.0%} interval")  # fmt: skip
    if 0 < measurement.predicted < math.inf:
        name = f"predicted by the noise scale: {format_count(measurement.predicted)}"
        ax.axvline(measurement.predicted, color=seen_on(ax, BATCH_SIZE_COLOR), linewidth=2, linestyle="--", label=name)
