"""The noise scale that the rest of a run will have, from how it grew while the loss fell.

Kaplan et al., *Scaling Laws for Neural Language Models* (arXiv 2001.08361, section 5.1), found the critical batch size
to follow a power law in the loss alone, B_crit(L) = B_* / L^(1/α_B), whatever the size of the model. Where a
run does not, it is a better guess that the noise scale stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median

from lightning_wn.batch_size.power_law import PowerLaw, fit_power_law
from lightning_wn.noise_scale.statistics import student_t_quantile

MIN_POINTS = 5
MIN_LOSS_RATIO = 1.1
_FIRST_ORIGIN = 3
"""Points of a run that a law needs to foretell the next one."""


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
    """Two forecasts of the noise scale in one: the power law B_simple(L) = B_* / L^(1/α), and that it stays as it is.

    Attributes:
        scale: B_*, the power law's noise scale at loss 1.
        exponent: 1/α: by the law, a loss that halves multiplies the noise scale by 2^exponent.
        exponent_error: Standard error of the exponent.
        weight: That of the power law, 0 to 1; the rest is the last noise scale's.
        last: The last noise scale.
        num_points: Points behind the fit.
        confidence: Level of the prediction intervals.
    """

    scale: float
    exponent: float
    exponent_error: float
    weight: float
    last: float
    num_points: int
    confidence: float
    _law: PowerLaw
    _error_of_last: float

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
        x = math.log(loss)
        center = self.weight * self._law.at(x) + (1.0 - self.weight) * math.log(self.last)
        # as if both erred together, which is the most that they can err
        error = self.weight * self._law.error_at(x) + (1.0 - self.weight) * self._error_of_last
        reach = student_t_quantile(self.confidence, self.num_points - 2) * error
        return Forecast(
            loss=loss, noise_scale=math.exp(center), lower=math.exp(center - reach), upper=math.exp(center + reach)
        )

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"noise scale {self.scale:.3g} / loss^{self.exponent:.2g} (exponent ±{self.exponent_error:.2g}, "
            f"{self.num_points} points), of which {self.weight:.0%} counts, and {1.0 - self.weight:.0%} that it stays "
            f"{self.last:.3g}"
        )


def fit_forecast(
    points: Sequence[LossPoint], *, confidence: float = 0.95, measured_at: float = 0.95
) -> NoiseScaleForecast:
    """Fit the power law to the run so far, and weigh it against a noise scale that stays what it was last.

    The law is fitted on logarithms, each point weighted by its interval. Then either is asked what it would have
    foretold from every earlier point of the run for all later ones, and each counts by the inverse of its mean square
    error there (Bates & Granger, *The Combination of Forecasts*, 1969). So a run on a power law is continued on it, and
    one whose noise scale went its own way is not.

    The points must be about independent of each other, as :func:`~.loss_points.loss_points` makes them.

    Args:
        points: At least five in the order of training, over losses that differ by 10 % or more.
        confidence: Level of the prediction intervals.
        measured_at: Level of the points' own intervals.

    Raises:
        ValueError: If there are too few points, or the loss hardly changed.

    Example:
        >>> points = [LossPoint(loss=x, noise_scale=64 / x**4, lower=60 / x**4, upper=68 / x**4)
        ...           for x in (2.0, 1.8, 1.5, 1.2, 1.0)]
        >>> forecast = fit_forecast(points)
        >>> round(forecast.exponent, 6), round(forecast.weight, 6), round(forecast.at(0.5).noise_scale)
        (4.0, 1.0, 1024)
    """
    for point in points:
        if not (0 < point.loss < math.inf and 0 < point.lower <= point.noise_scale <= point.upper < math.inf):
            raise ValueError(f"Points need a positive loss and a finite positive interval, got {point}; leave it out.")
    if len(points) < MIN_POINTS:
        raise ValueError(
            f"Too few points to forecast the noise scale: {len(points)} where |G|² is above zero, and {MIN_POINTS} are "
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
    law = fit_power_law(x, y, errors)
    of_law, of_last = _errors_so_far(x, y, errors)
    return NoiseScaleForecast(
        scale=math.exp(law.at(0.0)),
        exponent=-law.slope,
        exponent_error=law.slope_error,
        weight=of_last / (of_law + of_last) if of_last else 1.0,
        last=points[-1].noise_scale,
        num_points=len(points),
        confidence=confidence,
        _law=law,
        _error_of_last=max(math.sqrt(of_last), median(errors)),
    )


def _errors_so_far(x: Sequence[float], y: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the mean square errors of what the law and the last point would have foretold, from all earlier points."""
    of_law, of_last = [], []
    for known in range(_FIRST_ORIGIN, len(x)):
        # without a difference there is no slope
        law = fit_power_law(x[:known], y[:known], errors[:known]) if max(x[:known]) > min(x[:known]) else None
        for later in range(known, len(x)):
            of_last.append((y[known - 1] - y[later]) ** 2)
            of_law.append(of_last[-1] if law is None else (law.at(x[later]) - y[later]) ** 2)
    return fmean(of_law), fmean(of_last)


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
        points: In the order of training.
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
