"""A power law through points with errors: a line through logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = a x^slope, as the line log y = mean_y + slope (log x - mean_x).

    Attributes:
        slope: The exponent.
        slope_error: Its standard error.
        mean_x: Weighted mean of log x.
        mean_y: Weighted mean of log y.
        mean_error: Standard error of the line at ``mean_x``.
        point_error: Standard deviation of a typical point around the line.
    """

    slope: float
    slope_error: float
    mean_x: float
    mean_y: float
    mean_error: float
    point_error: float

    def at(self, log_x: float) -> float:
        """Return log y on the line."""
        return self.mean_y + self.slope * (log_x - self.mean_x)

    def error_at(self, log_x: float) -> float:
        """Return the standard deviation of a further point's log y around the line that was found."""
        return math.hypot(self.mean_error, self.slope_error * (log_x - self.mean_x), self.point_error)


def fit_power_law(log_x: Sequence[float], log_y: Sequence[float], errors: Sequence[float]) -> PowerLaw:
    """Fit by least squares on the logarithms, each point weighted by its error.

    Where the points scatter more than their errors allow, all errors are widened by as much.

    Args:
        log_x: Not all alike.
        log_y: As many.
        errors: Standard deviations of ``log_y``, positive.

    Example:
        >>> law = fit_power_law([0.0, 1.0, 2.0], [5.0, 3.0, 1.0], [0.1, 0.1, 0.1])
        >>> law.slope, law.at(3.0)
        (-2.0, -1.0)
    """
    weights = [1.0 / error**2 for error in errors]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, log_x, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, log_y, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, log_x, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, log_x, log_y, strict=True)) / spread
    residuals = [y - mean_y - slope * (x - mean_x) for x, y in zip(log_x, log_y, strict=True)]
    freedom = max(len(log_x) - 2, 1)
    excess = max(1.0, sum(w * r * r for w, r in zip(weights, residuals, strict=True)) / freedom)
    return PowerLaw(
        slope=slope,
        slope_error=math.sqrt(excess / spread),
        mean_x=mean_x,
        mean_y=mean_y,
        mean_error=math.sqrt(excess / total),
        point_error=math.sqrt(excess) * median(errors),
    )
