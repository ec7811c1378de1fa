"""The noise scale that the rest of a run will have, from how it grew while the loss fell.

Kaplan et al., *Scaling Laws for Neural Language Models* (arXiv 2001.08361, section 5.1), found the critical batch size
to follow a power law in the loss alone, B_crit(L) = B_* / L^(1/α_B), whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, median

from lightning_wn.noise_scale.statistics import student_t_quantile

MIN_POINTS = 5
MIN_LOSS_RATIO = 1.1
_BINS = 12


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """The noise scale at a loss.

    Attributes:
        loss: Smoothed training loss, positive.
        noise_scale: Estimate, positive and finite.
        lower: Lower end of its interval, positive.
        upper: Upper end, finite.
    """

    loss: float
    noise_scale: float
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A noise scale that is predicted for a loss, with its prediction interval.

    Attributes:
        loss: The loss.
        noise_scale: The prediction.
        lower: Lower end of the interval in which the next estimate will lie.
        upper: Its upper end.
    """

    loss: float
    noise_scale: float
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class NoiseScaleForecast:
    """The power law B_simple(L) = B_* / L^(1/α), fitted to a run.

    Attributes:
        scale: B_*, the noise scale at loss 1.
        exponent: 1/α: a loss that halves multiplies the noise scale by 2^exponent.
        exponent_error: Standard error of the exponent.
        num_points: Points behind the fit.
        confidence: Level of the prediction intervals.
    """

    scale: float
    exponent: float
    exponent_error: float
    num_points: int
    confidence: float
    _mean_log_loss: float
    _log_at_mean: float
    _variance_at_mean: float
    _variance_of_point: float

    @property
    def alpha(self) -> float:
        """α_B; 0.21 for the language models of Kaplan et al."""
        return 1.0 / self.exponent if self.exponent else math.inf

    def at(self, loss: float) -> Forecast:
        """Predict the noise scale at a loss.

        Args:
            loss: Positive.

        Raises:
            ValueError: If the loss is not a positive number.
        """
        if not 0 < loss < math.inf:
            raise ValueError(f"`loss` must be a positive number, got {loss!r}; a power law has no other.")
        distance = math.log(loss) - self._mean_log_loss
        center = self._log_at_mean - self.exponent * distance
        variance = self._variance_at_mean + (self.exponent_error * distance) ** 2 + self._variance_of_point
        reach = student_t_quantile(self.confidence, self.num_points - 2) * math.sqrt(variance)
        return Forecast(
            loss=loss, noise_scale=math.exp(center), lower=math.exp(center - reach), upper=math.exp(center + reach)
        )

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"noise scale {self.scale:.3g} / loss^{self.exponent:.2g} (exponent ±{self.exponent_error:.2g}, "
            f"{self.num_points} points)"
        )


def fit_forecast(
    points: Sequence[LossPoint], *, confidence: float = 0.95, measured_at: float = 0.95
) -> NoiseScaleForecast:
    """Fit the power law by least squares on the logarithms, each point weighted by its interval.

    The points must be about independent of each other: :func:`bin_points` makes such out of a logged run. Where they
    scatter more than their intervals allow, the errors are widened by as much.

    Args:
        points: At least five, over losses that differ by 10 % or more.
        confidence: Level of the prediction intervals.
        measured_at: Level of the points' own intervals.

    Raises:
        ValueError: If there are too few points, or the loss hardly changed.

    Example:
        >>> points = [LossPoint(loss=x, noise_scale=64 / x**4, lower=60 / x**4, upper=68 / x**4)
        ...           for x in (2.0, 1.8, 1.5, 1.2, 1.0)]
        >>> forecast = fit_forecast(points)
        >>> round(forecast.exponent, 6), round(forecast.at(0.5).noise_scale)
        (4.0, 1024)
    """
    for point in points:
        if not (0 < point.loss < math.inf and 0 < point.lower <= point.noise_scale <= point.upper < math.inf):
            raise ValueError(f"Points need a positive loss and a finite positive interval, got {point}; leave it out.")
    if len(points) < MIN_POINTS:
        raise ValueError(
            f"Too few points to forecast the noise scale: {len(points)} with a finite interval, and {MIN_POINTS} are "
            "needed; measure for longer."
        )
    if max(p.loss for p in points) < MIN_LOSS_RATIO * min(p.loss for p in points):
        raise ValueError(
            f"The loss hardly changed, from {max(p.loss for p in points):.4g} to {min(p.loss for p in points):.4g}: a "
            f"forecast needs losses that differ by {MIN_LOSS_RATIO - 1:.0%} or more; measure for longer."
        )
    quantile = NormalDist().inv_cdf(0.5 * (1.0 + measured_at))
    x = [math.log(point.loss) for point in points]
    y = [math.log(point.noise_scale) for point in points]
    # an interval of no length would outweigh all others
    errors = [max(math.log(point.upper / point.lower) / (2.0 * quantile), 1e-6) for point in points]
    weights = [1.0 / error**2 for error in errors]
    total = sum(weights)
    mean_x = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    mean_y = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    spread = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    slope = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True)) / spread
    residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    excess = max(1.0, sum(w * r * r for w, r in zip(weights, residuals, strict=True)) / (len(points) - 2))
    return NoiseScaleForecast(
        scale=math.exp(mean_y - slope * mean_x),
        exponent=-slope,
        exponent_error=math.sqrt(excess / spread),
        num_points=len(points),
        confidence=confidence,
        _mean_log_loss=mean_x,
        _log_at_mean=mean_y,
        _variance_at_mean=excess / total,
        _variance_of_point=excess * median(errors) ** 2,
    )


def bin_points(points: Sequence[LossPoint], bins: int = _BINS) -> list[LossPoint]:
    """Average a run's points, in the order of training, over so many stretches of equal length.

    Logged estimates are moving averages, so that neighbours tell the same thing, and a logged loss is one batch's: few
    averages instead of many points make both honest. The interval is that of a typical point of the stretch.

    Args:
        points: In the order of training.
        bins: How many to make; fewer points are returned as they are.

    Example:
        >>> points = [LossPoint(loss=x, noise_scale=10.0, lower=8.0, upper=12.5) for x in (4.0, 2.0, 1.0, 1.0)]
        >>> [round(point.loss, 3) for point in bin_points(points, 2)]
        [2.828, 1.0]
    """
    if len(points) <= bins:
        return list(points)

    def mean(part: Sequence[LossPoint], name: str) -> float:
        return math.exp(fmean(math.log(getattr(point, name)) for point in part))

    cuts = [i * len(points) // bins for i in range(bins + 1)]
    parts = [points[start:end] for start, end in pairwise(cuts)]
    names = ("loss", "noise_scale", "lower", "upper")
    return [LossPoint(**{name: mean(part, name) for name in names}) for part in parts]


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """How a forecast from the first part of a run did on the rest.

    Attributes:
        inside: Share of the held-out points within their prediction interval.
        error_factor: Root mean square error, as a factor: 1.2 is off by 20 %.
        constant_error_factor: That of saying that the noise scale stays what it was last.
        num_held_out: Points that were held out.
        forecast: The fit on the first part.
    """

    inside: float
    error_factor: float
    constant_error_factor: float
    num_held_out: int
    forecast: NoiseScaleForecast


def score_forecast(points: Sequence[LossPoint], *, share: float = 0.5, confidence: float = 0.95) -> HeldOutScore:
    """Fit on the first part of a run and score on the rest, at the losses that it really had.

    Args:
        points: In the order of training, binned.
        share: The part that is fitted, between 0 and 1.
        confidence: Level of the prediction intervals.

    Raises:
        ValueError: If ``share`` is out of range, or one of the parts has too few points.
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must lie between 0 and 1, exclusive, got {share!r}; 0.5 fits on the first half.")
    cut = math.ceil(share * len(points))
    first, rest = points[:cut], points[cut:]
    if not rest:
        raise ValueError(f"No point is left to score: {len(points)} with `share={share!r}`; give more points.")
    forecast = fit_forecast(first, confidence=confidence)
    predicted = [forecast.at(point.loss) for point in rest]
    inside = [a.lower <= point.noise_scale <= a.upper for a, point in zip(predicted, rest, strict=True)]
    errors = [math.log(a.noise_scale / point.noise_scale) for a, point in zip(predicted, rest, strict=True)]
    constant = [math.log(first[-1].noise_scale / point.noise_scale) for point in rest]
    return HeldOutScore(
        inside=fmean(inside),
        error_factor=math.exp(math.sqrt(fmean(error * error for error in errors))),
        constant_error_factor=math.exp(math.sqrt(fmean(error * error for error in constant))),
        num_held_out=len(rest),
        forecast=forecast,
    )
