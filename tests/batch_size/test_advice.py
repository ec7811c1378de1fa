import json
import math
from dataclasses import replace

import pytest
from helpers.made_up_estimates import make_advice, make_estimate

from lightning_wn.batch_size import ObservedRun, RunConfiguration, RunTime, advise_batch_size


def test_suggests_the_reachable_size_nearest_to_the_noise_scale():
    advice = make_advice(130.0)  # micro-batches of 8
    assert (advice.suggested_batch_size, advice.suggested_accumulate_grad_batches) == (128, 16)
    assert advice.steps_factor == pytest.approx((1 + 130 / 128) / (1 + 130 / 32))
    assert advice.examples_factor == pytest.approx((1 + 128 / 130) / (1 + 32 / 130))
    assert advice.sgd_learning_rate_factor == pytest.approx(1 / advice.steps_factor)
    assert advice.adam_learning_rate_factor == pytest.approx(advice.sgd_learning_rate_factor**0.5)
    text = str(advice)
    assert "Noise scale 130 examples (95 % interval 117 to 143; 400 measurements, batch size 32)." in text
    assert "Try a batch size of 128 examples: accumulate_grad_batches=16 instead of 4, or 4 ranks instead of 1." in text
    assert "2.5x fewer steps and 1.6x the examples; learning rate x2.5 for SGD, x1.6 for Adam" in text
    assert not advice.doubts


def test_suggestions_below_the_present_size_cost_steps_and_save_examples():
    advice = make_advice(16.0)
    assert advice.suggested_accumulate_grad_batches == 2
    assert "1.3x the steps and 1.5x fewer examples; learning rate x0.75 for SGD, x0.87 for Adam" in str(advice)


def test_ranks_count_in_what_is_reachable():
    # 4 ranks, 2 micro-batches of 8 on each: the next size up is 96
    advice = make_advice(100.0, batch_size=64.0, accumulate=2, ranks=4)
    assert (advice.suggested_batch_size, advice.suggested_accumulate_grad_batches) == (96, 3)


@pytest.mark.parametrize("batch_size", [31.7, 57.0, 100.1])
@pytest.mark.parametrize("accumulate", [3, 29, 49, 58])
@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_batch_size_of_any_fraction_is_listed_once(batch_size, accumulate, times):
    """Whatever one part in so many of it, taken as often, rounds to."""
    advice = make_advice(times * batch_size, batch_size=batch_size, accumulate=accumulate)
    assert advice.suggested_batch_size == times * batch_size
    micro_batches = [candidate.accumulate_grad_batches for candidate in advice.candidates]
    assert len(set(micro_batches)) == len(micro_batches)
    assert ("Keep the batch size" in str(advice)) == (times == 1)
    assert (f"or {times} ranks instead of 1" in str(advice)) == (times > 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_keeps_a_batch_size_that_is_right(ranks):
    advice = make_advice(33.0, ranks=ranks)
    assert advice.suggested_batch_size == 32
    assert advice.steps_factor == advice.examples_factor == advice.sgd_learning_rate_factor == 1
    assert "Keep the batch size: 32 examples is the reachable size nearest" in str(advice)
    assert "learning rate" not in str(advice)


@pytest.mark.parametrize(
    ("ranks", "hint"),
    [
        (1, "micro-batches of about 2 with accumulate_grad_batches=2"),
        (2, "micro-batches of about 2 with accumulate_grad_batches=1"),
    ],
)
def test_below_one_micro_batch_a_smaller_micro_batch_is_named(ranks, hint):
    advice = make_advice(3.0 if ranks == 1 else 4.0, ranks=ranks)
    assert advice.suggested_accumulate_grad_batches == 1
    assert "below one micro-batch per rank (8 examples in all)" in str(advice)
    assert hint in str(advice)


def test_a_noise_scale_of_zero_asks_for_the_smallest_batch():
    advice = make_advice(0.0, 0.0, 2.0)
    assert advice.suggested_batch_size == 8
    assert (advice.steps_factor, advice.examples_factor) == (1, 0.25)
    assert "as many steps and 4x fewer examples; learning rate x1 for SGD, x1 for Adam" in str(advice)
    assert "nan" not in str(advice)


def test_no_suggestion_while_the_noise_scale_is_infinite():
    advice = make_advice(math.inf, 140.0, math.inf)
    assert math.isnan(advice.suggested_batch_size)
    assert advice.suggested_accumulate_grad_batches == 0
    assert "No advice on the batch size: |G|² is not above zero yet; measure more steps." in str(advice)
    assert "probably above 140 examples" in str(advice)
    assert "Not sure yet" not in str(advice), "which is the advice itself here"
    # |G|² significantly negative: no noise scale fits
    assert "probably above" not in str(make_advice(math.inf, math.inf, math.inf))


def test_no_suggestion_before_the_first_measurement():
    advice = make_advice(math.nan, 0.0, math.inf, batch_size=math.nan, num_measurements=0)
    assert str(advice) == "No advice on the batch size: the noise scale was not measured yet."
    assert math.isnan(advice.suggested_batch_size)


def test_an_open_interval_makes_it_a_guess():
    text = str(make_advice(105.0, 40.0, math.inf))
    assert "A first guess, to be confirmed: a batch size of 104 examples" in text
    assert "cannot be told from zero" in text
    assert "probably above 40 examples" in text
    assert "probably above" not in str(make_advice(100.0, 0.0, math.inf))


def test_wide_intervals_and_far_suggestions_carry_a_warning():
    assert "interval is still wide" in str(make_advice(100.0, 60.0, 150.0))
    assert "interval is still wide" not in str(make_advice(33.0, 10.0, 90.0)), "nothing is to be changed"
    assert "go part of the way and measure again" in str(make_advice(5000.0))


def test_the_unit_is_the_users():
    assert "Try a batch size of 128 tokens" in str(make_advice(130.0, unit="tokens"))


def test_to_dict_is_plain():
    values = make_advice(130.0).to_dict()
    # without NaN and Infinity, which are no JSON
    assert json.dumps(make_advice(math.inf, 140.0, math.inf).to_dict(), allow_nan=False)
    assert json.dumps(make_advice(100.0, 0.0, math.inf).to_dict(), allow_nan=False)
    assert values["steps"] == {
        "value": values["steps_factor"],
        "lower": pytest.approx(0.36, 0.1),
        "upper": pytest.approx(0.42, 0.1),
    }
    assert json.loads(json.dumps(values))["configuration"] == {"accumulate_grad_batches": 4, "num_ranks": 1}


@pytest.mark.parametrize(("noise_scale", "accumulate"), [(59.0, 7), (61.0, 8), (67.0, 8), (69.0, 9)])
def test_the_nearest_size_may_lie_on_either_side(noise_scale, accumulate):
    assert make_advice(noise_scale).suggested_accumulate_grad_batches == accumulate


def test_from_eight_times_the_present_size_it_is_far():
    assert "go part of the way" not in str(make_advice(31 * 8.0))
    assert "go part of the way" in str(make_advice(32 * 8.0))


def test_the_interval_is_carried_through_to_each_factor():
    advice = make_advice(128.0, 64.0, math.inf)
    at = {end: (1 + end / 128) / (1 + end / 32) for end in (64.0, 128.0)}
    assert advice.steps.value == pytest.approx(at[128.0])
    assert (advice.steps.lower, advice.steps.upper) == pytest.approx((0.25, at[64.0]))
    assert (advice.examples.lower, advice.examples.upper) == pytest.approx((1.0, (64 + 128) / (64 + 32)))


class TestTarget:
    def test_a_tenth_of_the_noise_scale_costs_a_tenth_more_examples(self):
        advice = advise_batch_size(make_estimate(1280.0), RunConfiguration(accumulate_grad_batches=4), target=0.1)
        assert advice.suggested_batch_size == 128
        assert "0.1 times the noise scale training costs 1.1 times the fewest possible examples and 11 times" in str(
            advice
        )

    def test_the_default_says_that_it_costs_twice_the_examples(self):
        assert "costs twice the fewest possible examples" in str(make_advice(130.0))

    @pytest.mark.parametrize("target", [0, -1.0, math.inf, math.nan])
    def test_only_positive_numbers_are_targets(self, target):
        with pytest.raises(ValueError, match="`target` must be a positive number"):
            advise_batch_size(make_estimate(128.0), RunConfiguration(), target=target)


class TestLearningRate:
    """One factor is meant, and the optimizer tells which."""

    @pytest.mark.parametrize(
        ("rule", "name", "says", "hides"), [("sgd", "SGD", "x2.5 (", "x1.6"), ("adam", "AdamW", "x1.6 (", "x2.5 for")]
    )
    def test_of_the_runs_own_optimizer(self, rule, name, says, hides):
        run = ObservedRun(optimizer=name, optimizer_family=rule)
        advice = advise_batch_size(make_estimate(130.0), RunConfiguration(accumulate_grad_batches=4), run)
        assert advice.learning_rate.value == getattr(advice, f"{rule}_learning_rate_factor")
        assert f"{name}'s learning rate {says}" in str(advice)
        assert hides not in str(advice).split("learning rate", 1)[1].splitlines()[0]

    def test_the_noise_scale_depends_on_it(self):
        text = str(make_advice(130.0))
        assert "predicted 36 at the tuned rate of SGD, where 34 was measured, and 124 at a quarter of it" in text

    @pytest.mark.parametrize(("family", "says"), [("adam", True), ("sgd", False)])
    def test_momentum_is_not_in_it(self, family, says):
        run = ObservedRun(optimizer="Some", optimizer_family=family)
        advice = advise_batch_size(make_estimate(130.0), RunConfiguration(accumulate_grad_batches=4), run)
        assert ("Momentum is not in it" in str(advice)) == says


class TestHours:
    TIME = RunTime(micro_batch_seconds=0.5, step_seconds=1.0, num_steps=100)  # 3 s a step of 4 micro-batches
    RUN = ObservedRun(num_steps=500, planned_steps=1200, time=TIME)  # 1 hour in all

    def advise(self, **kwargs):
        configuration = RunConfiguration(accumulate_grad_batches=4, num_ranks=kwargs.pop("ranks", 1))
        return advise_batch_size(make_estimate(128.0), configuration, self.RUN, **kwargs)

    def test_by_accumulation(self):
        by_size = {candidate.batch_size: candidate for candidate in self.advise().candidates}
        assert list(by_size) == [8, 16, 32, 64, 128, 256, 512]
        assert by_size[32].hours.value == pytest.approx(1.0)
        # 16 micro-batches and one step: 9 s, and 0.4 of the steps
        assert by_size[128].hours.value == pytest.approx(0.4 * 9 / 3)
        assert by_size[8].hours.value == pytest.approx((1 + 128 / 8) / (1 + 128 / 32) * 1.5 / 3)

    def test_on_more_ranks_a_step_takes_as_long_as_now(self):
        advice = self.advise(ranks=2)
        (four_times,) = (c for c in advice.more_ranks if c.batch_size == 128)
        assert (four_times.num_ranks, four_times.accumulate_grad_batches) == (8, 4)
        assert four_times.hours.value == pytest.approx(0.4)
        assert four_times.device_hours.value == pytest.approx(0.4 * 8)

    def test_goodput_is_throughput_times_efficiency(self):
        now = next(c for c in self.advise().candidates if c.batch_size == 32)
        assert now.goodput == pytest.approx(32 / 3 * 1 / (1 + 32 / 128))
        # to the same loss the needed examples are the same: time goes with one over goodput
        for other in self.advise().candidates:
            assert other.time.value == pytest.approx(now.goodput / other.goodput)

    def test_a_price_gives_money(self):
        cost = {c.batch_size: c.cost.value for c in self.advise(ranks=2, price_per_device_hour=3.0).candidates}
        assert cost[32] == pytest.approx(6.0)
        assert "cost" in str(self.advise(price_per_device_hour=3.0))
        with pytest.raises(ValueError, match="`price_per_device_hour` must be a positive number or None, got -1"):
            self.advise(price_per_device_hour=-1)

    def test_the_assumptions_are_named(self):
        text = str(self.advise())
        assert "0.5 s a micro-batch and 1 s a step beside" in text
        assert "1,200 steps" in text
        assert "on more ranks if these stay what they are" in text
        assert "60 min" in text or "1.0 h" in text

    def test_without_times_there_are_no_hours(self):
        assert all(candidate.hours is None and candidate.goodput is None for candidate in make_advice(128.0).candidates)


class TestDoubts:
    def doubts(self, estimate=None, **run):
        configuration = RunConfiguration(accumulate_grad_batches=4)
        return " ".join(advise_batch_size(estimate or make_estimate(128.0), configuration, ObservedRun(**run)).doubts)

    def test_none_without_a_reason(self):
        assert not self.doubts(num_steps=5000, planned_steps=10000, micro_batches_per_epoch=10_000)

    def test_few_steps(self):
        assert "just begun (99 steps)" in self.doubts(num_steps=99)
        assert not self.doubts(num_steps=100)
        assert "just begun (400 steps)" in self.doubts(num_steps=400, planned_steps=10_000)

    def test_an_average_that_reaches_back_to_the_beginning(self):
        """Fewer measurements than the average remembers: 1 / (1 - decay)."""
        begun = "still holds the beginning of training (80 measurements at ema_decay=0.99)"
        estimate = replace(make_estimate(128.0), num_measurements=80)
        assert begun in self.doubts(estimate, num_steps=800, ema_decay=0.99)
        assert begun not in self.doubts(estimate, num_steps=800, ema_decay=0.98)
        assert begun not in self.doubts(estimate, num_steps=800, ema_decay=1.0)  # a plain mean is meant to
        assert begun not in self.doubts(estimate, num_steps=80, ema_decay=0.99)  # which is said already
        assert "beginning" not in self.doubts(replace(estimate, num_measurements=0), num_steps=800, ema_decay=0.99)

    def test_a_learning_rate_that_rises(self):
        assert "learning rate is still rising" in self.doubts(num_steps=5000, learning_rate_rises=True)

    def test_a_part_of_the_parameters(self):
        assert "Only 50% of the parameters" in self.doubts(replace(make_estimate(128.0), coverage=0.5))

    def test_batches_near_the_size_of_the_data(self):
        # micro-batches of 8: an epoch of 40 holds 320
        assert "40% of an epoch (320 examples)" in self.doubts(micro_batches_per_epoch=40)
        assert not self.doubts(micro_batches_per_epoch=80)


def test_logs_do_not_tell_the_accumulation():
    advice = advise_batch_size(make_estimate(130.0), RunConfiguration(accumulate_grad_batches=None))
    assert (advice.suggested_batch_size, advice.suggested_accumulate_grad_batches) == (130, 0)
    assert "Try a batch size of 130 examples: 4.1 times the present one." in str(advice)
    assert "accumulate" not in str(advice)
