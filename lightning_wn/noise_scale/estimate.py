"""The noise-scale estimate that users read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_wn.noise_scale.statistics import PairMoments
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
        upper: Its upper end; infinite below 3 measurements and where |G|² cannot be told from zero.
        batch_size: The batch size in use: ``unit`` in the last full optimizer step that was measured.
        num_measurements: How many optimizer steps were measured and used.
        coverage: Measured share of the trainable parameters, 0 to 1.
        unit: What is counted: ``"examples"``, or what the callback's user named.
        probe: Where the gradient samples came from.
        confidence: Confidence level of the interval.
        approximate: Whether the probe is only approximate; its documentation says in which direction.
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
    unchecked: str = ""

    @classmethod
    def from_moments(
        cls, moments: PairMoments, *, batch_size: float, confidence: float, **known: Any
    ) -> NoiseScaleEstimate:
        """Build the estimate from the smoothed measurements; ``known`` are further attributes."""
        num_measurements = int(moments.count)
        enough = num_measurements >= MIN_MEASUREMENTS_FOR_INTERVAL
        lower, upper = moments.interval(confidence) if enough else (0.0, math.inf)
        noise_scale = moments.noise_scale()
        return cls(
            grad_sq_norm=moments.mean_x if num_measurements else math.nan,
            cov_trace=moments.mean_y if num_measurements else math.nan,
            noise_scale=noise_scale,
            lower=lower,
            upper=math.inf if math.isinf(noise_scale) else upper,
            batch_size=batch_size if num_measurements else math.nan,
            num_measurements=num_measurements,
            confidence=confidence,
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
        return (
            f"{name} {format_count(self.noise_scale)} {self.unit} ({self.confidence * 100:g} % interval "
            f"{format_count(self.lower)} to {format_count(self.upper)}; {self.num_measurements} measurements, "
            f"batch size {format_count(self.batch_size)}{part}{doubt})"
        )
