"""The result: a measured critical batch size, with what was measured at every batch size."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lightning_wn.critical_batch_size.analysis import TradeoffFit
from lightning_wn.noise_scale.drawing import BATCH_SIZE_COLOR, GRID_COLOR, NOISE_SCALE_COLOR, figure_and_axis, seen_on
from lightning_wn.reports.noise_scale_figure import SUGGESTION_COLOR
from lightning_wn.text import format_count, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["branches", "target_loss"]


@dataclass(frozen=True, kw_only=True)
class MeasuredBatchSize:
    """What was measured at one batch size, over all seeds; NaN where it was not.

    Attributes:
        batch_size: Examples in an optimizer step, as asked for.
        mean_batch_size: The same as it was: less where an epoch ends with a short batch.
        learning_rate_factor: What the model's own learning rate was multiplied with.
        steps: Optimizer steps to the target loss (geometric mean over the seeds; infinite where a seed did not get
            there), or in the whole branch.
        examples: Examples that these took.
        loss: Smoothed loss at the end of the branch.
        excess: How much that is above the loss at the smallest batch size, after the same examples.
        excess_error: Its standard error.
        noise_scale: Mean noise scale along the branch, where a noise-scale callback was there: the batch size that it
            predicts to be critical.
    """

    batch_size: int
    mean_batch_size: float
    learning_rate_factor: float
    steps: float
    examples: float
    loss: float
    excess: float = math.nan
    excess_error: float = math.nan
    noise_scale: float = math.nan


@dataclass(frozen=True, kw_only=True)
class CriticalBatchSizeMeasurement:
    """A measured critical batch size. ``print`` shows a table, :meth:`to_dict` is for machines.

    Attributes:
        method: ``"branches"`` or ``"target_loss"``.
        critical_batch_size: Examples in an optimizer step.
        lower: Lower end of its interval.
        upper: Upper end; infinite where no branch was large enough to tell.
        confidence: Level of the interval.
        batch_sizes: What was measured, by batch size.
        predicted: What the noise scale predicted: its mean along the branch whose batch size was nearest to it. NaN
            where no noise-scale callback was in the Trainers.
        fit: The fitted law, for ``"target_loss"``.
        tolerance: How much more loss was allowed, for ``"branches"``.
        target_loss: The loss that was to be reached, for ``"target_loss"``.
        unit: What is counted.
        notes: Sentences on what to be careful with.
    """

    method: Method
    critical_batch_size: float
    lower: float
    upper: float
    confidence: float
    batch_sizes: tuple[MeasuredBatchSize, ...]
    predicted: float = math.nan
    fit: TradeoffFit | None = None
    tolerance: float = math.nan
    target_loss: float = math.nan
    unit: str = "examples"
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, texts, lists and dictionaries, for JSON."""
        return asdict(self)

    def to_csv(self) -> str:
        """Return the table of batch sizes as text in CSV."""
        out = io.StringIO()
        names = [field.name for field in fields(MeasuredBatchSize)]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.batch_sizes)
        return out.getvalue()

    def plot(self, ax: Any = None) -> Figure:
        """Draw what was measured, with the critical batch size and its interval.

        Steps against examples to the target loss with the fitted law, or the excess of loss against batch size with
        the tolerance.

        Args:
            ax: A matplotlib axis; None makes a figure.

        Raises:
            ModuleNotFoundError: If matplotlib is missing; ``pip install "lightning-wn[plots]"`` brings it.
        """
        figure: Figure = draw_measurement(self, ax)
        return figure

    def __str__(self) -> str:
        """Return a few sentences and the table."""
        interval = f"{self.confidence:.0%} interval {_count(self.lower)} to {_count(self.upper)}"
        lines = [f"Critical batch size {_count(self.critical_batch_size)} {self.unit} ({interval})."]
        if self.method == "branches":
            lines.append(
                f"It is the largest whose loss is within {self.tolerance:g} of that at the smallest, after as many "
                f"{self.unit}."
            )
        elif self.fit is not None:
            lines.append(
                f"To loss {self.target_loss:g} training takes at least {_count(self.fit.min_steps)} steps and at least "
                f"{_count(self.fit.min_examples)} {self.unit}; the law fits to {self.fit.residual:.0%}."
            )
        if not math.isnan(self.predicted):
            lines.append(f"The noise scale predicted {_count(self.predicted)}{_ratio(self)}.")
        return "\n".join([*lines, *self._table(), *self.notes])

    def _table(self) -> list[str]:
        rows = self.batch_sizes
        columns: list[tuple[str, Sequence[str]]] = [
            ("batch size", [format_count(row.batch_size) for row in rows]),
            ("learning rate", [f"x{row.learning_rate_factor:.3g}" for row in rows]),
            ("steps", [_count(row.steps) for row in rows]),
            (self.unit, [_count(row.examples) for row in rows]),
            ("loss", [f"{row.loss:.4g}" for row in rows]),
        ]
        if self.method == "branches":
            columns.append(("excess", [_plus_minus(row.excess, row.excess_error) for row in rows]))
        if self.fit is not None:
            columns.append(("law's steps", [_count(self.fit.steps(row.mean_batch_size)) for row in rows]))
        if not all(math.isnan(row.noise_scale) for row in rows):
            columns.append(("noise scale", [_count(row.noise_scale) for row in rows]))
        return text_table(columns)


def _count(number: float) -> str:
    return "infinite" if math.isinf(number) else "-" if math.isnan(number) else format_count(number)


def _plus_minus(value: float, error: float) -> str:
    return f"{value:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _ratio(measurement: CriticalBatchSizeMeasurement) -> str:
    measured = measurement.critical_batch_size
    if not (0 < measured < math.inf and 0 < measurement.predicted < math.inf):
        return ""
    return f", {measurement.predicted / measured:.2g} times what was measured"


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
