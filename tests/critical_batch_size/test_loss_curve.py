"""Smoothed losses and steps to a loss, against curves whose answer is known."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from lightning_wn.critical_batch_size.loss_curve import CurveRecorder, LossCurve, Smoother


def curve(loss, steps=2000, batch_size=8):
    """The loss of step s is taken before its update, when s - 1/2 steps are half done."""
    counts = tuple(range(1, steps + 1))
    return LossCurve(counts, tuple(batch_size * s for s in counts), tuple(loss(s - 0.5) for s in counts))


class TestSmoothing:
    @pytest.mark.parametrize("power", [-0.2, -0.5, -1.0])
    def test_a_power_law_is_hardly_bent(self, power):
        """A line through a window of ±18 % of a convex curve overestimates by power² · 0.18² / 6 at most: 0.6 %."""
        found = curve(lambda s: 3.0 * s**power)
        for step in (20, 100, 1000):
            assert Smoother(found)(step) == pytest.approx(3.0 * step**power, rel=0.006)

    def test_noise_is_averaged(self):
        """Between 1000/1.2 and 1000·1.2 lie 367 steps: a standard error of 0.3/√367 = 0.016, here within four."""
        rng = random.Random(0)
        found = curve(lambda s: 1.0 + rng.gauss(0.0, 0.3))
        assert Smoother(found)(1000) == pytest.approx(1.0, abs=0.064)
        assert Smoother(found)(1000) != 1.0

    def test_a_straight_line_in_log_steps_stays(self):
        found = curve(lambda s: 5.0 - math.log(s))
        assert Smoother(found)(300) == pytest.approx(5.0 - math.log(300), abs=1e-9)

    def test_a_single_point(self):
        assert Smoother(LossCurve((1,), (8.0,), (2.5,)))(1) == 2.5


class TestStepsTo:
    @pytest.mark.parametrize("target", [0.5, 0.2, 0.1])
    def test_of_a_power_law(self, target):
        assert curve(lambda s: 2.0 * s**-0.5).steps_to(target) == pytest.approx((2.0 / target) ** 2, rel=0.015)

    def test_is_the_same_share_at_every_batch_size(self):
        """Ten times the batch and a tenth of the steps: the same number of examples."""
        small = curve(lambda s: 3.0 * s**-0.5, steps=4000).steps_to(0.1)
        large = curve(lambda s: 3.0 * (10 * s) ** -0.5, steps=400).steps_to(0.1)
        assert small == pytest.approx(10 * large, rel=0.01)

    def test_not_reached(self):
        assert curve(lambda s: 2.0 * s**-0.5, steps=100).steps_to(0.2) == math.inf

    def test_what_smoothing_cannot_see_yet_is_not_reached(self):
        """Step 100 is judged by the steps up to 120."""
        assert curve(lambda s: 2.0 * s**-0.5, steps=115).steps_to(0.2) == math.inf
        assert curve(lambda s: 2.0 * s**-0.5, steps=125).steps_to(0.2) == pytest.approx(100, rel=0.02)

    def test_below_from_the_start(self):
        assert curve(lambda s: 0.1, steps=10).steps_to(0.2) == 0.5

    def test_monitored_values_are_joined(self):
        """From 1.0 at step 10 to 0.5 at step 40: 0.75 half-way in log(steps), which is 20."""
        values = LossCurve((10, 40), (80.0, 320.0), (1.0, 0.5))
        assert values.steps_to(0.75, smoothing=0) == pytest.approx(20.0)
        assert values.steps_to(0.5, smoothing=0) == pytest.approx(40.0)

    def test_of_no_steps(self):
        assert LossCurve().steps_to(1.0) == math.inf


class TestMeans:
    def test_against_single_examples(self):
        """Every example of a step carries the step's loss."""
        rng = random.Random(1)
        sizes = [rng.randint(1, 9) for _ in range(50)]
        losses = [rng.random() for _ in sizes]
        recorder = CurveRecorder()
        for size, loss in zip(sizes, losses, strict=True):
            recorder.add(examples=size, loss=loss)
        examples = [loss for size, loss in zip(sizes, losses, strict=True) for _ in range(size)]
        edges = [10, 37, 90, 150]
        expected = [sum(examples[a:b]) / (b - a) for a, b in pairwise(edges)]
        assert recorder.curve().means(edges) == pytest.approx(expected, rel=1e-12)

    def test_beyond_the_end(self):
        assert math.isnan(LossCurve((1,), (8.0,), (1.0,)).means([10, 20])[0])


class TestRecorder:
    def test_memory_is_bounded_and_sums_stay(self):
        recorder = CurveRecorder(most_points=64)
        losses = [math.sin(i) + 2 for i in range(1000)]
        for loss in losses:
            recorder.add(examples=4, loss=loss)
        found = recorder.curve()
        assert len(found.steps) <= 64
        assert recorder.steps == found.steps[-1] == 1000
        assert found.examples[-1] == 4000
        assert found.means([0, 4000]) == pytest.approx([sum(losses) / 1000])

    def test_joined_points_say_the_same(self):
        """1,999 steps in 64 points of 32: only the early part is coarse."""
        coarse = CurveRecorder(most_points=64)
        for step in range(1, 2000):
            coarse.add(examples=8, loss=2.0 * (step - 0.5) ** -0.5)
        assert coarse.curve().steps_to(0.06) == pytest.approx((2.0 / 0.06) ** 2, rel=0.01)
