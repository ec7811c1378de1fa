"""The two equations, the moving moments and Fieller's interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.frozen_digits import textbook_pair
from scipy import stats

from lightning_wn.noise_scale.estimate import NoiseScaleEstimate
from lightning_wn.noise_scale.statistics import (
    PairMoments,
    fieller_interval,
    solve_noise_scale,
    student_t_quantile,
)


class TestTwoEquations:
    def test_appendix_a1(self):
        """Equal sizes: |G|² = (B·|G_B|² - b·|G_b|²)/(B - b), S = (|G_b|² - |G_B|²)/(1/b - 1/B)."""
        b, big = 8, 64
        small_norm, big_norm = 3.7, 1.9
        grad_sq_norm, cov_trace = solve_noise_scale(small_norm, big_norm, 1 / b, 1 / big)
        assert grad_sq_norm == pytest.approx((big * big_norm - b * small_norm) / (big - b), rel=1e-12)
        assert cov_trace == pytest.approx((small_norm - big_norm) / (1 / b - 1 / big), rel=1e-12)

    def test_general_form_is_unbiased_for_unequal_sizes_and_weights(self):
        torch.manual_seed(0)
        sizes = torch.tensor([5.0, 1.0, 9.0])
        weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        dimension, repeats = 20, 40_000
        mean = torch.full((dimension,), 0.3, dtype=torch.float64)
        deviation = torch.linspace(0.5, 2.0, dimension, dtype=torch.float64)
        noise = torch.randn(repeats, 3, dimension, dtype=torch.float64) * deviation / sizes.sqrt()[:, None]
        samples = mean + noise
        small = (samples.square().sum(-1) * weights).sum(-1)
        big = (samples * weights[:, None]).sum(1).square().sum(-1)
        pairs = [
            solve_noise_scale(float(s), float(g), float((weights / sizes).sum()), float((weights**2 / sizes).sum()))
            for s, g in zip(small, big, strict=True)
        ]
        estimates = torch.tensor(pairs, dtype=torch.float64)
        expected = torch.tensor([mean @ mean, deviation @ deviation])
        error = estimates.std(0) / repeats**0.5
        assert ((estimates.mean(0) - expected).abs() < 3 * error).all()
        assert (estimates[:, 1] >= 0).all()  # tr Σ of one step is a sum of squares

    def test_agrees_with_a_linear_solver(self):
        torch.manual_seed(1)
        sizes = [4, 4, 4, 1]
        samples = torch.randn(4, 30, dtype=torch.float64)
        inverse = sum(1 / n for n in sizes)
        got = solve_noise_scale(
            float(samples.square().sum(1).mean()), float(samples.mean(0).square().sum()), inverse / 4, inverse / 16
        )
        assert got == pytest.approx(textbook_pair(samples, sizes), rel=1e-10)

    def test_single_sample_is_no_information(self):
        with pytest.raises(ZeroDivisionError):
            solve_noise_scale(1.0, 1.0, 1 / 8, 1 / 8)


class TestMoments:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
    def test_against_direct_sums(self, decay):
        torch.manual_seed(0)
        values = torch.randn(12, 2, dtype=torch.float64)
        moments = PairMoments()
        for x, y in values.tolist():
            moments = moments.updated(x, y, decay)
        weights = torch.tensor([decay ** (11 - i) for i in range(12)], dtype=torch.float64)
        mean = (weights[:, None] * values).sum(0) / weights.sum()
        centred = values - mean
        assert moments.mean_x == pytest.approx(float(mean[0]), rel=1e-12)
        assert moments.mean_y == pytest.approx(float(mean[1]), rel=1e-12)
        sums = torch.einsum("i,ij,ik->jk", weights, centred, centred)
        got = (moments.sxx, moments.sxy, moments.syy)
        assert got == pytest.approx((float(sums[0, 0]), float(sums[0, 1]), float(sums[1, 1])), abs=1e-12)
        assert moments.effective_size == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))

    def test_decay_one_is_the_plain_mean_and_its_usual_standard_error(self):
        torch.manual_seed(0)
        values = torch.randn(50, 2, dtype=torch.float64)
        moments = PairMoments()
        for x, y in values.tolist():
            moments = moments.updated(x, y, 1.0)
        covariance = torch.cov(values.T) / 50
        expected = (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))
        assert moments.covariance_of_means() == pytest.approx(expected, rel=1e-12)

    def test_ratio_of_means_not_mean_of_ratios(self):
        moments = PairMoments().updated(1.0, 10.0, 1.0).updated(3.0, 10.0, 1.0)
        assert moments.noise_scale() == 5.0

    def test_never_negative_nan_before_the_first(self):
        assert math.isnan(PairMoments().noise_scale())
        assert PairMoments().updated(-1.0, 10.0, 0.9).noise_scale() == math.inf
        assert PairMoments().updated(0.0, 10.0, 0.9).noise_scale() == math.inf

    def test_round_trip(self):
        moments = PairMoments().updated(1.0, 2.0, 0.9).updated(2.0, 5.0, 0.9)
        assert PairMoments.from_list(moments.to_list()) == moments


class TestStudentT:
    @pytest.mark.parametrize("freedom", [0.8, 1.0, 2.0, 4.5, 19.0, 39.9, 40.1, 199.0, 1e5])
    @pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.999])
    def test_against_scipy(self, freedom, confidence):
        expected = stats.t.ppf(0.5 + confidence / 2, freedom)
        # the expansion's next term is 3e-7 at 40 degrees of freedom and 99.9 %; an interval needs three digits
        assert student_t_quantile(confidence, freedom) == pytest.approx(expected, rel=2e-6)


class TestFieller:
    def test_accepts_exactly_the_ratios_of_the_t_test(self):
        torch.manual_seed(0)
        for _ in range(300):
            mean_x, mean_y = torch.randn(2).tolist()
            root = torch.randn(2, 2, dtype=torch.float64)
            (var_x, cov_xy), (_, var_y) = (root @ root.T / 10).tolist()
            mean_y = abs(mean_y)
            lower, upper = fieller_interval(mean_x, mean_y, var_x=var_x, cov_xy=cov_xy, var_y=var_y, quantile=2.0)
            assert 0 <= lower <= upper
            for ratio in torch.logspace(-3, 3, 61).tolist():
                deviation = abs(mean_y - ratio * mean_x)
                accepted = deviation <= 2 * math.sqrt(max(var_y - 2 * ratio * cov_xy + ratio**2 * var_x, 0))
                if accepted:  # whatever the t-test accepts lies in the interval
                    assert lower * (1 - 1e-9) <= ratio <= upper * (1 + 1e-9)
                elif mean_x > 2 * math.sqrt(var_x) and mean_y > 2 * math.sqrt(var_y):
                    assert not lower * (1 + 1e-9) < ratio < upper * (1 - 1e-9)

    def test_no_upper_end_where_the_gradient_cannot_be_told_from_zero(self):
        lower, upper = fieller_interval(0.1, 5.0, var_x=0.01, cov_xy=0.0, var_y=0.01, quantile=2.0)
        assert upper == math.inf
        assert 5.0 / 0.4 < lower < 5.0 / 0.2  # the ratio at the upper end of |G|², about 0.3

    def test_significantly_negative_gradient_norm(self):
        assert fieller_interval(-1.0, 5.0, var_x=0.01, cov_xy=0.0, var_y=0.01, quantile=2.0) == (math.inf, math.inf)

    @pytest.mark.parametrize("seen", [0, 1, 2])
    def test_no_interval_below_three_measurements(self, seen):
        moments = PairMoments()
        for i in range(seen):
            moments = moments.updated(1.0 + 0.01 * i, 50.0 + i, 1.0)
        estimate = NoiseScaleEstimate.from_moments(
            moments, batch_size=32, coverage=1.0, unit="examples", probe="", confidence=0.95
        )
        assert (estimate.lower, estimate.upper) == (0.0, math.inf)
        assert math.isnan(estimate.noise_scale) == (seen == 0)

    @pytest.mark.parametrize("decay", [1.0, 0.8])
    def test_ends_are_where_the_t_test_turns(self, decay):
        """(mean_y - r mean_x) over its standard error is Student's quantile at n_eff - 1 degrees of freedom."""
        values = [(1.0, 50.0), (1.3, 52.0), (0.9, 45.0), (1.1, 57.0), (1.2, 49.0)]
        moments = PairMoments()
        for x, y in values:
            moments = moments.updated(x, y, decay)
        weights = np.array([decay ** (4 - i) for i in range(5)])
        effective_size = weights.sum() ** 2 / (weights**2).sum()
        for end in moments.interval(0.9):
            residuals = np.array([y - end * x for x, y in values])
            mean = np.average(residuals, weights=weights)
            variance = np.cov(residuals, aweights=weights) / effective_size
            assert mean**2 / variance == pytest.approx(stats.t.ppf(0.95, effective_size - 1) ** 2, rel=1e-6)

    def test_decay_zero_knows_one_measurement_only(self):
        moments = PairMoments()
        for i in range(9):
            moments = moments.updated(1.0 + i, 50.0, 0.0)
        assert moments.interval(0.95) == (0.0, math.inf)


def simulated_coverage(noise_scale: float, ranks: int, measurements: int, decay: float, runs: int = 600) -> float:
    """Share of runs whose interval covers the truth, for Gaussian gradients in 400 dimensions, |G|² = 1.

    Drawn by the norms' exact law: with σ² the variance of one sample's element, |ḡ|² is
    (1 + σ z/√K)² + σ²/K χ²(d - 1), and the samples' scatter about ḡ is an independent σ²/K χ²(d (K - 1)).
    """
    torch.manual_seed(ranks * 1000 + measurements)
    dimension, batch = 400, 32
    variance = noise_scale / dimension / batch
    shape = (runs, measurements)
    along = 1 + (variance / ranks) ** 0.5 * torch.randn(shape, dtype=torch.float64)
    across = variance / ranks * torch.distributions.Chi2(torch.tensor(dimension - 1.0).double()).sample(shape)
    scatter = (
        variance / ranks * torch.distributions.Chi2(torch.tensor(dimension * (ranks - 1.0)).double()).sample(shape)
    )
    big = along.square() + across
    covered = 0
    for small_norms, big_norms in zip((big + scatter).tolist(), big.tolist(), strict=True):
        moments = PairMoments()
        for s, g in zip(small_norms, big_norms, strict=True):
            moments = moments.updated(*solve_noise_scale(s, g, 1 / batch, 1 / (batch * ranks)), decay)
        lower, upper = moments.interval(0.95)
        covered += lower <= noise_scale <= upper
    return covered / runs


# standard error of a coverage near 0.95 over 600 runs: 0.9 %, so 92-98 % is 3 of them
@pytest.mark.parametrize(
    ("noise_scale", "ranks", "measurements", "decay"),
    [(50, 4, 5, 1.0), (1000, 2, 5, 1.0), (50, 2, 60, 0.9), (1000, 8, 40, 1.0), (50, 8, 300, 0.99)],
)
def test_interval_covers_the_truth(noise_scale, ranks, measurements, decay):
    assert 0.92 <= simulated_coverage(noise_scale, ranks, measurements, decay) <= 0.98


def test_interval_covers_at_short_memory():
    """Decay 0.5 leaves three effective measurements: Student's t is cautious there, never too narrow."""
    assert simulated_coverage(50, 4, 30, 0.5) >= 0.92


def test_says_infinity_where_the_gradient_drowns_in_noise():
    torch.manual_seed(0)
    infinite = 0
    for _ in range(100):
        moments = PairMoments()
        for _ in range(10):  # |G|² = 0
            samples = torch.randn(2, 200, dtype=torch.float64)
            small, big = float(samples.square().sum(1).mean()), float(samples.mean(0).square().sum())
            moments = moments.updated(*solve_noise_scale(small, big, 1.0, 0.5), 1.0)
        infinite += moments.interval(0.95)[1] == math.inf
    # a gradient of zero looks positive in 2.5 % of runs by construction
    assert infinite >= 93


def test_an_infinite_noise_scale_has_no_finite_upper_end():
    """Also where small ratios alone would pass the t-test: |G|² below zero, tr Σ hardly above it."""
    moments = PairMoments()
    for x, y in [(-1.0, 0.9), (-1.01, -0.7), (-0.99, 0.8), (-1.0, -0.6)]:
        moments = moments.updated(x, y, 1.0)
    assert math.isfinite(moments.interval(0.95)[1])
    estimate = NoiseScaleEstimate.from_moments(
        moments, batch_size=32, coverage=1.0, unit="examples", probe="", confidence=0.95
    )
    assert (estimate.noise_scale, estimate.upper) == (math.inf, math.inf)
