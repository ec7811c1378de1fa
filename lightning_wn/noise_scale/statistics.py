"""From squared gradient norms to |G|², tr(Σ), their ratio and its confidence interval.

Pure mathematics on Python floats: nothing here knows of layers, ranks or training loops. The symbols
are those of McCandlish, Kaplan, Amodei et al., *An Empirical Model of Large-Batch Training*
(arXiv 1812.06162): one example's gradient has mean G and covariance Σ, and the simple noise scale is
B_simple = tr(Σ) / |G|².
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import NormalDist

# of skewed measurements the upper end lies as much further out as so many times their skewness would have it to first
# order in 1/√n: a sample shows a part of the skewness that heavy tails have (docs/statistics.md has the coverage)
_SKEWNESS_FACTOR = 4.0
# n_eff of a fully decayed mean is 1 up to rounding: one measurement says nothing of its spread
_LEAST_FREEDOM = 1e-6
# of an alarm that is looked for at every log step of many runs
_BEYOND_DOUBT = 0.9999
# relative spread: measurements of other examples differ by a percent and more, of the same ones by rounding
_SAME = 1e-4


def solve_noise_scale(
    sample_sq_norm: float, grad_sq_norm: float, sample_inverse_size: float, grad_inverse_size: float
) -> tuple[float, float]:
    """Solve for |G|² and tr(Σ) from the squared norms of gradients over fewer and over more examples.

    A gradient sample g_k is a mean gradient over n_k examples, so E|g_k|² = |G|² + tr(Σ)/n_k. The
    weighted mean ḡ = Σ w_k g_k of independent samples (Σ w_k = 1) has E|ḡ|² = |G|² + tr(Σ) Σ w_k²/n_k.
    Both are linear in |G|² and tr(Σ); two measured norms determine them without bias. With equal sizes
    n_k = b and weights 1/K this is Appendix A.1 of arXiv 1812.06162 with B_small = b, B_big = K·b.

    Averaging the small norms with the same weights, Σ w_k |g_k|², keeps the system regular for K >= 2
    whatever the sizes: the determinant is Σ w_k (1 - w_k)/n_k, and tr(Σ) comes out of
    Σ w_k |g_k - ḡ|², which is never negative.

    Args:
        sample_sq_norm: Σ w_k |g_k|², the weighted mean of the samples' squared norms.
        grad_sq_norm: |ḡ|², the squared norm of the samples' weighted mean.
        sample_inverse_size: Σ w_k / n_k, in 1/examples.
        grad_inverse_size: Σ w_k² / n_k, in 1/examples; smaller than ``sample_inverse_size``.

    Returns:
        The pair (|G|², tr(Σ)). Each is unbiased and noisy; |G|² is often negative.

    Raises:
        ZeroDivisionError: If both inverse sizes are equal, as for a single sample: no information.
    """
    determinant = sample_inverse_size - grad_inverse_size
    cov_trace = (sample_sq_norm - grad_sq_norm) / determinant
    return grad_sq_norm - cov_trace * grad_inverse_size, cov_trace


class Moments(ABC):
    """Exponentially weighted moments of measurements that give |G|² and tr Σ, in whatever way.

    Measurement i of T carries the weight ``decay ** (T - i)``: with ``decay < 1`` the mean is the
    bias-corrected exponential moving average, with ``decay == 1`` the plain mean. Second moments are
    central and updated in Welford's way, so that nothing cancels.

    Attributes:
        weight: Σ weights.
        squared_weight: Σ weights².
        count: Measurements so far, however much they have decayed.
    """

    weight: float
    squared_weight: float
    count: float

    @abstractmethod
    def pair(self) -> tuple[float, float]:
        """Return the smoothed |G|² and tr Σ."""

    @abstractmethod
    def covariance_of_means(self) -> tuple[float, float, float]:
        """Return the unbiased (var(x), cov(x, y), var(y)) of :meth:`pair`; needs n_eff > 1."""

    @abstractmethod
    def skewness(self) -> float:
        """Return the skewness of y - r x over measurements, at the noise scale r; 0 where it is not known."""

    @abstractmethod
    def to_list(self) -> list[float]:
        """Return the moments as plain numbers."""

    @property
    def effective_size(self) -> float:
        """n_eff = (Σw)² / Σw², the number of equally weighted measurements worth as much; 0 if empty."""
        return self.weight * self.weight / self.squared_weight if self.weight else 0.0

    def scale_of_covariance(self) -> float:
        """Return what makes the unbiased covariance of means of weighted sums of products of deviations."""
        freedom = self.weight - self.squared_weight / self.weight
        return 1.0 / (freedom * self.effective_size)

    def noise_scale(self) -> float:
        """B_simple = tr(Σ)/|G|²: NaN when empty, infinite (never negative) when |G|² is not positive."""
        if not self.weight:
            return math.nan
        x, y = self.pair()
        return max(y / x, 0.0) if x > 0.0 else math.inf

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return Fieller's interval for the noise scale; see :func:`fieller_interval`.

        From 0 to infinity where the spread is not known, and where no noise scale fits. Where measurements are skewed
        upwards, beyond what √(6/n) says of symmetric ones, the mean of few of them is more often too low, and the
        upper end has a larger quantile, after the Edgeworth expansion of Student's t (P. Hall, *The Bootstrap and
        Edgeworth Expansion*, section 2.6, 1992).
        """
        quantile = self._quantile(confidence)
        lower, upper = self._fieller(quantile)
        if not math.isfinite(lower):
            return 0.0, math.inf
        size = self.effective_size
        skewed = max(self.skewness() - math.sqrt(6.0 / size), 0.0) if math.isfinite(upper) else 0.0
        if skewed:
            further = _SKEWNESS_FACTOR * skewed * (2.0 * quantile * quantile + 1.0) / (6.0 * math.sqrt(size))
            upper = self._fieller(quantile + further)[1]
        return lower, upper

    @property
    def is_impossible(self) -> bool:
        """Whether |G|² or tr Σ is negative beyond doubt, which no independent samples of one gradient give."""
        return math.isinf(self._fieller(self._quantile(_BEYOND_DOUBT))[0])

    @property
    def is_repeated(self) -> bool:
        """Whether all measurements are the same, as of the same examples at the same weights."""
        if self.count < 2.0 or self._freedom < _LEAST_FREEDOM:
            return False
        x, y = self.pair()
        var_x, _, var_y = self.covariance_of_means()
        spread = math.sqrt(self.effective_size) / _SAME
        return math.sqrt(var_x) * spread <= abs(x) and math.sqrt(var_y) * spread <= abs(y)

    @property
    def _freedom(self) -> float:
        return self.effective_size - 1.0

    def _quantile(self, confidence: float) -> float:
        return math.inf if self._freedom < _LEAST_FREEDOM else student_t_quantile(confidence, self._freedom)

    def _fieller(self, quantile: float) -> tuple[float, float]:
        if math.isinf(quantile):
            return 0.0, math.inf
        x, y = self.pair()
        var_x, cov_xy, var_y = self.covariance_of_means()
        return fieller_interval(x, y, var_x=var_x, cov_xy=cov_xy, var_y=var_y, quantile=quantile)


@dataclass(frozen=True)
class PairMoments(Moments):
    """Exponentially weighted moments of the measurements (x, y) = (|G|², tr Σ).

    Attributes:
        weight: Σ weights.
        squared_weight: Σ weights².
        mean_x: Weighted mean of |G|², in (loss / parameter)².
        mean_y: Weighted mean of tr Σ, in (loss / parameter)² · examples.
        sxx: Weighted sum of (x - mean_x)².
        sxy: Weighted sum of (x - mean_x)(y - mean_y).
        syy: Weighted sum of (y - mean_y)².
        sxxx: Weighted sum of (x - mean_x)³; ``sxxy``, ``sxyy`` and ``syyy`` likewise.
        count: Measurements so far, however much they have decayed.
    """

    weight: float = 0.0
    squared_weight: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    sxx: float = 0.0
    sxy: float = 0.0
    syy: float = 0.0
    sxxx: float = 0.0
    sxxy: float = 0.0
    sxyy: float = 0.0
    syyy: float = 0.0
    count: float = 0.0

    def updated(self, x: float, y: float, decay: float) -> PairMoments:
        """Return the moments after one more measurement of weight 1, all earlier ones decayed."""
        weight = decay * self.weight + 1.0
        dx, dy = x - self.mean_x, y - self.mean_y
        carried = decay * self.weight / weight
        sxx, sxy, syy = decay * self.sxx, decay * self.sxy, decay * self.syy
        cubed = carried * (carried - 1.0 / weight)
        return PairMoments(
            weight=weight,
            squared_weight=decay * decay * self.squared_weight + 1.0,
            mean_x=self.mean_x + dx / weight,
            mean_y=self.mean_y + dy / weight,
            sxx=sxx + carried * dx * dx,
            sxy=sxy + carried * dx * dy,
            syy=syy + carried * dy * dy,
            sxxx=decay * self.sxxx + cubed * dx * dx * dx - 3.0 * dx * sxx / weight,
            sxxy=decay * self.sxxy + cubed * dx * dx * dy - (2.0 * dx * sxy + dy * sxx) / weight,
            sxyy=decay * self.sxyy + cubed * dx * dy * dy - (dx * syy + 2.0 * dy * sxy) / weight,
            syyy=decay * self.syyy + cubed * dy * dy * dy - 3.0 * dy * syy / weight,
            count=self.count + 1.0,
        )

    def pair(self) -> tuple[float, float]:
        """Return the smoothed |G|² and tr Σ."""
        return self.mean_x, self.mean_y

    def covariance_of_means(self) -> tuple[float, float, float]:
        """Return the unbiased (var(mean_x), cov(mean_x, mean_y), var(mean_y)); needs n_eff > 1."""
        scale = self.scale_of_covariance()
        return self.sxx * scale, self.sxy * scale, self.syy * scale

    def skewness(self) -> float:
        """Return the skewness of y - r x over measurements, at the noise scale r; 0 where it is not known."""
        if self.mean_x <= 0.0:
            return 0.0
        r = self.mean_y / self.mean_x
        squares = self.syy - 2.0 * r * self.sxy + r * r * self.sxx
        cubes = self.syyy - 3.0 * r * self.sxyy + 3.0 * r * r * self.sxxy - r**3 * self.sxxx
        return standardized_skewness(cubes, squares, self.weight)

    def to_list(self) -> list[float]:
        """Return the moments as plain numbers, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_list(cls, values: Sequence[float]) -> PairMoments:
        """Rebuild the moments from :meth:`to_list`."""
        return cls(*values)


def standardized_skewness(cubes: float, squares: float, weight: float) -> float:
    """Return (Σ e³/W)/(Σ e²/W)^1.5, or 0 where nothing varies."""
    return cubes / weight / (squares / weight) ** 1.5 if squares > 0.0 else 0.0


def fieller_interval(
    mean_x: float, mean_y: float, *, var_x: float, cov_xy: float, var_y: float, quantile: float
) -> tuple[float, float]:
    """Confidence interval for the ratio y/x of two correlated means, restricted to [0, ∞].

    Fieller's theorem (E. C. Fieller, *Some problems in interval estimation*, JRSS B 16, 1954): a ratio r
    is accepted when (mean_y - r·mean_x)² <= quantile² · var(mean_y - r·mean_x). A noise scale is not
    negative, and where |G|² cannot be told from zero no finite upper end exists.

    Args:
        mean_x: Mean of the denominator, |G|².
        mean_y: Mean of the numerator, tr Σ.
        var_x: Variance of ``mean_x``.
        cov_xy: Covariance of the two means.
        var_y: Variance of ``mean_y``.
        quantile: Two-sided quantile of Student's t.

    Returns:
        (lower, upper), ``0 <= lower <= upper``. ``upper`` is infinite when |G|² is not distinguishable
        from zero; both are infinite where no noise scale fits, as when |G|² is significantly negative.
    """
    t2 = quantile * quantile
    # accepted r solve a·r² - 2·b·r + c <= 0
    a = mean_x * mean_x - t2 * var_x
    b = mean_x * mean_y - t2 * cov_xy
    c = mean_y * mean_y - t2 * var_y
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a <= 0.0:
        # r = 0 is accepted when c <= 0; otherwise the accepted set starts at the positive root
        if c <= 0.0:
            return 0.0, math.inf
        return c / (b + root) if b + root > 0.0 else math.inf, math.inf
    # the root that adds up, and the other one from their product: nothing cancels
    far = b + math.copysign(root, b)
    low, high = sorted((far / a, c / far if far else 0.0))
    return (max(low, 0.0), high) if high > 0.0 else (math.inf, math.inf)


@lru_cache(maxsize=4096)
def student_t_quantile(confidence: float, freedom: float) -> float:
    """Two-sided quantile t of Student's distribution: P(|T| <= t) = confidence.

    Args:
        confidence: Probability between 0 and 1, exclusive.
        freedom: Degrees of freedom, any positive number.

    Returns:
        The quantile, accurate to about six digits.
    """
    if freedom > 40.0:  # there the expansion is as accurate, and a hundred times faster
        return _student_t_quantile_expansion(confidence, freedom)
    # with z = t²/(ν + t²), P(|T| <= t) = I_z(1/2, ν/2), increasing in z
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if _regularized_incomplete_beta(0.5, 0.5 * freedom, middle) < confidence:
            low = middle
        else:
            high = middle
    z = 0.5 * (low + high)
    return math.sqrt(freedom * z / (1.0 - z)) if z < 1.0 else math.inf


def _student_t_quantile_expansion(confidence: float, freedom: float) -> float:
    """Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5); its error is O(ν⁻⁵)."""
    x = NormalDist().inv_cdf(0.5 * (1.0 + confidence))
    x2 = x * x
    terms = (
        x * (x2 + 1) / 4,
        x * ((5 * x2 + 16) * x2 + 3) / 96,
        x * (((3 * x2 + 19) * x2 + 17) * x2 - 15) / 384,
        x * ((((79 * x2 + 776) * x2 + 1482) * x2 - 1920) * x2 - 945) / 92160,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _regularized_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), evaluated with Lentz's method."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _regularized_incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    fraction = numerator_ratio = 1.0
    denominator_ratio = 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            coefficient = 1.0
        elif i % 2 == 0:
            coefficient = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            coefficient = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        denominator_ratio = 1.0 + coefficient * denominator_ratio
        denominator_ratio = 1.0 / (denominator_ratio if abs(denominator_ratio) > tiny else tiny)
        numerator_ratio = 1.0 + coefficient / numerator_ratio
        numerator_ratio = numerator_ratio if abs(numerator_ratio) > tiny else tiny
        delta = numerator_ratio * denominator_ratio
        fraction *= delta
        if i and abs(delta - 1.0) < 1e-15:
            break
    return math.exp(log_front) / a * (fraction - 1.0)
