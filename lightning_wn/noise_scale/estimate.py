"""The noise-scale estimate that users read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_wn.noise_scale.statistics import Moments
from lightning_wn.text import format_count

# with two measurements the spread is known to one degree of freedom only: no interval is honest
MIN_MEASUREMENTS_FOR_INTERVAL = 3


@dataclass(frozen=True, kw_only=True)
class NoiseScaleEstimate:
    """The gradient noise scale with its confidence interval (McCandlish et al., arXiv 1812.06162).

    Attributes:
        grad_sq_norm: Smoothed |G|², the squared norm of the true gradient, in (loss / parameter)².
            Unbiased, so it may come out negative while noise dominates. NaN before any measurement.
        cov_trace: Smoothed tr(Σ), the variance of one example's gradient summed over all parameters,
            in (loss / parameter)² · ``unit``. NaN before any measurement.
        noise_scale: B_simple = tr(Σ)/|G|² in ``unit``: the predicted critical batch size. NaN before the
            first measurement, infinite (never negative) when the smoothed |G|² is not positive.
        lower: Lower end of Fieller's interval for ``noise_scale``, in ``unit``.
        upper: Its upper end; infinite below 3 measurements and where |G|² cannot be told from zero. From 0 to infinity
            where ``impossible`` or ``repeated``.
        batch_size: The batch size in use: ``unit`` in the last full optimizer step that was measured; of tokens and
            other parts of examples what a step holds on average.
        num_measurements: How many optimizer steps were measured and used.
        coverage: Measured share of the trainable parameters, 0 to 1.
        unit: What is counted: ``"examples"``, or what the callback's user named.
        probe: Where the gradient samples came from.
        confidence: Confidence level of the interval.
        approximate: Whether the probe is only approximate; its documentation says in which direction.
        impossible: Whether |G|² or tr(Σ) is negative beyond doubt, which independent samples of the gradient that the
            optimizer uses do not give: an alarm, no result.
        repeated: Whether all measurements are of the same examples, and nothing is known of what others would give.
        skewness: How skewed the measurements are, upwards where positive; above 1 heavy tails leave the interval less
            sure than it says.
        unchecked: Why it is not known whether examples mix, so that single ones have no gradient and this is wrong;
            empty where they do not, or where it does not matter.

    Example:
        >>> print(NoiseScaleEstimate(
        ...     grad_sq_norm=0.05, cov_trace=4.5, noise_scale=90.0, lower=80.0, upper=102.0,
        ...     batch_size=128.0, num_measurements=400, coverage=1.0, unit="examples",
        ...     probe="micro_batch", confidence=0.95))
        noise scale 90 examples (95 % interval 80 to 102; 400 measurements, batch size 128)
    """

    grad_sq_norm: float
    cov_trace: float
    noise_scale: float
    lower: float
    upper: float
    batch_size: float
    num_measurements: int
    coverage: float
    unit: str
    probe: str
    confidence: float
    approximate: bool = False
    impossible: bool = False
    repeated: bool = False
    skewness: float = 0.0
    unchecked: str = ""

    @classmethod
    def from_moments(
        cls, moments: Moments, *, batch_size: float, confidence: float, repeated: bool = False, **known: Any
    ) -> NoiseScaleEstimate:
        """Build the estimate from the smoothed measurements; ``known`` are further attributes."""
        num_measurements = int(moments.count)
        enough = num_measurements >= MIN_MEASUREMENTS_FOR_INTERVAL
        repeated = num_measurements > 1 and (repeated or moments.is_repeated)
        lower, upper = moments.interval(confidence) if enough and not repeated else (0.0, math.inf)
        noise_scale = moments.noise_scale()
        grad_sq_norm, cov_trace = moments.pair() if num_measurements else (math.nan, math.nan)
        # GᵀHG may well be negative; of approximate samples nothing is beyond doubt
        exact = not known.get("approximate", False) and known.get("probe") != "curvature"
        return cls(
            grad_sq_norm=grad_sq_norm,
            cov_trace=cov_trace,
            noise_scale=noise_scale,
            lower=lower,
            upper=math.inf if math.isinf(noise_scale) else upper,
            batch_size=batch_size if num_measurements else math.nan,
            num_measurements=num_measurements,
            confidence=confidence,
            impossible=exact and enough and not repeated and moments.is_impossible,
            repeated=repeated,
            skewness=moments.skewness() if enough else 0.0,
            **known,
        )

    def to_metrics(self) -> dict[str, float]:
        """Return what loggers get, by the last part of its key."""
        return {
            "noise_scale": self.noise_scale,
            "noise_scale_lower": self.lower,
            "noise_scale_upper": self.upper,
            "grad_sq_norm": self.grad_sq_norm,
            "cov_trace": self.cov_trace,
            "batch_size": self.batch_size,
        }

    @property
    def is_resolved(self) -> bool:
        """Whether |G|² can be told from zero, so that the interval has a finite upper end."""
        return math.isfinite(self.upper)

    def __str__(self) -> str:
        """One line for people."""
        if not self.num_measurements:
            return "noise scale not measured yet"
        name = "approximate noise scale" if self.approximate else "noise scale"
        part = "" if self.coverage >= 1.0 else f", {self.coverage:.0%} of the parameters"
        doubt = f"; examples could not be checked for mixing: {self.unchecked}" if self.unchecked else ""
        measured = f"{self.num_measurements} measurements, batch size {format_count(self.batch_size)}{part}{doubt}"
        if self.impossible:
            return f"{name} unknown ({measured}): {self.what_is_negative} is negative beyond doubt, which cannot be"
        interval = f"{self.confidence * 100:g} % interval {format_count(self.lower)} to {format_count(self.upper)}"
        if self.repeated:
            interval = "all of the same examples, so that there is no interval"
        return f"{name} {format_count(self.noise_scale)} {self.unit} ({interval}; {measured})"

    @property
    def what_is_negative(self) -> str:
        """Name what must not be negative and is, for messages."""
        return "|G|²" if self.grad_sq_norm < 0.0 else "tr(Σ)"
