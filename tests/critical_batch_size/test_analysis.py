"""The fitted law, the tolerance rule, and the average of the noise scale, against cases with a known answer."""

from __future__ import annotations

import math
import random

import pytest

from lightning_wn.critical_batch_size.analysis import (
    Excess,
    fit_tradeoff,
    largest_within,
    loss_excess,
    mean_noise_scale,
)

SIZES = [2, 4, 8, 16, 32, 64, 128, 256, 512]


def law(size, critical=30.0, least=50.0):
    return least * (1.0 + critical / size)


class TestFit:
    @pytest.mark.parametrize("critical", [0.5, 30.0, 4000.0])
    def test_exact_data(self, critical):
        fit = fit_tradeoff(SIZES, [law(size, critical) for size in SIZES])
        assert fit.critical_batch_size.value == pytest.approx(critical, rel=1e-6)
        assert fit.min_steps == pytest.approx(50.0, rel=1e-6)
        assert fit.min_examples == pytest.approx(50.0 * critical, rel=1e-6)
        assert fit.steps(16) == pytest.approx(law(16, critical), rel=1e-6)
        # nothing is left to doubt
        assert fit.critical_batch_size.lower == pytest.approx(critical, rel=1e-3)
        assert fit.critical_batch_size.upper == pytest.approx(critical, rel=1e-3)

    def test_measured_steps_of_digits(self):
        """Steps that a small network took on digits, at tuned learning rates: B_crit about 23 by another fit."""
        fit = fit_tradeoff(SIZES, [810, 560, 300, 230, 152, 104, 92, 85, 81])
        assert 15 < fit.critical_batch_size.lower < 23 < fit.critical_batch_size.upper < 45

    @pytest.mark.parametrize("sizes", [SIZES, [4, 16, 64, 256]])
    def test_interval_covers(self, sizes):
        """300 fits to steps with a relative error of 10 %: 0.95 ± three standard errors of 0.013."""
        rng = random.Random(0)
        hits = 0
        for _ in range(300):
            fit = fit_tradeoff(sizes, [law(size) * math.exp(rng.gauss(0.0, 0.1)) for size in sizes])
            hits += fit.critical_batch_size.lower <= 30.0 <= fit.critical_batch_size.upper
        assert hits / 300 == pytest.approx(0.95, abs=0.038)

    def test_no_upper_end_where_all_take_the_same_examples(self):
        fit = fit_tradeoff([2, 4, 8, 16], [1000, 510, 246, 126])
        assert fit.critical_batch_size.upper == math.inf
        assert fit.critical_batch_size.lower > 16

    def test_no_lower_end_where_all_take_the_same_steps(self):
        fit = fit_tradeoff([64, 128, 256, 512], [100, 98, 102, 100])
        assert fit.critical_batch_size.lower == 0.0
        assert fit.critical_batch_size.upper < 64

    def test_exactly_the_same_examples(self):
        fit = fit_tradeoff([2, 4, 8], [400, 200, 100])
        assert fit.critical_batch_size.value == math.inf
        assert fit.min_steps == 0.0
        assert fit.steps(16) == pytest.approx(50.0)

    def test_exactly_the_same_steps(self):
        fit = fit_tradeoff([2, 4, 8], [100, 100, 100])
        assert (fit.critical_batch_size.value, fit.critical_batch_size.lower) == (0.0, 0.0)
        assert fit.steps(16) == pytest.approx(100.0)

    def test_several_seeds_narrow_the_interval(self):
        rng = random.Random(1)
        noisy = [(size, law(size) * math.exp(rng.gauss(0.0, 0.1))) for _ in range(8) for size in SIZES]
        one, all_ = (fit_tradeoff(*zip(*part, strict=True)).critical_batch_size for part in (noisy[:9], noisy))
        assert math.log(all_.upper / all_.lower) < 0.6 * math.log(one.upper / one.lower)

    def test_two_sizes_settle_nothing(self):
        with pytest.raises(ValueError, match="three batch sizes that reached the target loss, got 2"):
            fit_tradeoff([2, 4, 4], [100, 60, 61])


def excesses(*values, margin=0.004):
    sizes = [2**i * 8 for i in range(len(values))]
    return [
        Excess(batch_size=size, value=value, error=margin / 2, margin=margin if i else 0.0)
        for i, (size, value) in enumerate(zip(sizes, values, strict=True))
    ]


class TestLargestWithin:
    def test_interval_from_surely_inside_to_surely_outside(self):
        found = largest_within(excesses(0.0, 0.002, 0.008, 0.012, 0.05), 0.01)
        assert (found.value, found.lower, found.upper) == (32, 16, 128)

    def test_all_inside(self):
        found = largest_within(excesses(0.0, 0.001, -0.002), 0.01)
        assert (found.value, found.lower, found.upper) == (32, 32, math.inf)

    def test_none_inside(self):
        found = largest_within(excesses(0.0, 0.1, 0.2), 0.01)
        assert (found.value, found.lower, found.upper) == (8, 8, 16)

    def test_a_branch_that_diverged_is_outside(self):
        assert largest_within(excesses(0.0, 0.001, math.inf), 0.01).value == 16

    def test_largest_counts_where_a_smaller_one_is_worse(self):
        """The definition says the largest; the lower end tells that it is not sure."""
        found = largest_within(excesses(0.0, 0.02, 0.001, 0.3), 0.01)
        assert (found.value, found.lower, found.upper) == (32, 8, 64)

    def test_unknown_errors(self):
        bare = [Excess(batch_size=b, value=v, error=math.nan, margin=math.nan) for b, v in ((8, 0.0), (16, 0.5))]
        assert largest_within(bare, 0.01).upper == 16


class TestExcess:
    def test_interval_covers(self):
        """Student's t over ten differences: 2,000 of them hold the truth in 0.95 ± three standard errors, 0.015."""
        rng = random.Random(2)
        hits = 0
        for _ in range(2000):
            excess = loss_excess(16, [rng.gauss(0.02, 0.01) for _ in range(10)])
            hits += abs(excess.value - 0.02) <= excess.margin
        assert hits / 2000 == pytest.approx(0.95, abs=0.015)

    def test_one_difference_has_no_error(self):
        assert math.isnan(loss_excess(16, [0.3]).error)


class TestMeanNoiseScale:
    @pytest.mark.parametrize("batch_size", [3.0, 50.0, 800.0])
    def test_predicts_the_same_at_every_batch_size(self, batch_size):
        """Training gets on by 1/(1 + N(s)/B) a step, with N(s) growing from 10 to 210: E_min/S_min is 110 on average.

        The steps are walked one by one, to 2,000 of an infinite batch: the sum is off by 1/2,000 at most.
        """
        progress, noise_scales = 0.0, []
        while progress < 2000:
            noise_scales.append(10.0 + progress / 10.0)
            progress += 1.0 / (1.0 + noise_scales[-1] / batch_size)
        found = mean_noise_scale(noise_scales, batch_size, [1.0] * len(noise_scales))
        assert found == pytest.approx(110.0, rel=1e-3)

    def test_weights_are_steps(self):
        assert mean_noise_scale([10.0, 40.0], 20.0, [3.0, 1.0]) == pytest.approx(
            mean_noise_scale([10.0, 10.0, 10.0, 40.0], 20.0, [1.0] * 4)
        )

    def test_an_infinite_one_takes_examples_and_gets_nowhere(self):
        near = mean_noise_scale([10.0, 1e12], 20.0, [1.0, 1.0])
        assert mean_noise_scale([10.0, math.inf], 20.0, [1.0, 1.0]) == pytest.approx(near)
        assert mean_noise_scale([math.inf], 20.0, [1.0]) == math.inf

    def test_what_is_not_measured_does_not_count(self):
        assert mean_noise_scale([math.nan, 10.0], 20.0, [5.0, 1.0]) == pytest.approx(10.0)
        assert math.isnan(mean_noise_scale([math.nan], 20.0, [1.0]))
