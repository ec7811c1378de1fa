import json
import math

import pytest
from made_up_estimates import make_advice


def test_suggests_the_reachable_size_nearest_to_the_noise_scale():
    advice = make_advice(130.0)  # micro-batches of 8
    assert (advice.suggested_batch_size, advice.suggested_accumulate_grad_batches) == (128, 16)
    assert advice.steps_factor == pytest.approx((1 + 130 / 128) / (1 + 130 / 32))
    assert advice.examples_factor == pytest.approx((1 + 128 / 130) / (1 + 32 / 130))
    assert advice.sgd_learning_rate_factor == pytest.approx(1 / advice.steps_factor)
    assert advice.adam_learning_rate_factor == pytest.approx(advice.sgd_learning_rate_factor**0.5)
    text = str(advice)
    assert "Noise scale 130 examples (95 % interval 117 to 143; 400 measurements, batch size 32)." in text
    assert "Try a batch size of 128 examples: accumulate_grad_batches=16 instead of 4." in text
    assert "2.5x fewer steps and 1.6x the examples; learning rate x2.5 for SGD, x1.6 for Adam" in text
    assert len(text.splitlines()) == 2


def test_suggestions_below_the_present_size_cost_steps_and_save_examples():
    advice = make_advice(16.0)
    assert advice.suggested_accumulate_grad_batches == 2
    assert "1.3x the steps and 1.5x fewer examples; learning rate x0.75 for SGD, x0.87 for Adam" in str(advice)


def test_ranks_count_in_what_is_reachable():
    # 4 ranks, 2 micro-batches of 8 on each: the next size up is 96
    advice = make_advice(100.0, batch_size=64.0, accumulate=2, ranks=4)
    assert (advice.suggested_batch_size, advice.suggested_accumulate_grad_batches) == (96, 3)


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
    assert json.loads(json.dumps(values))["configuration"] == {"accumulate_grad_batches": 4, "num_ranks": 1}


@pytest.mark.parametrize(("noise_scale", "accumulate"), [(59.0, 7), (61.0, 8), (67.0, 8), (69.0, 9)])
def test_the_nearest_size_may_lie_on_either_side(noise_scale, accumulate):
    assert make_advice(noise_scale).suggested_accumulate_grad_batches == accumulate


def test_from_eight_times_the_present_size_it_is_far():
    assert "go part of the way" not in str(make_advice(31 * 8.0))
    assert "go part of the way" in str(make_advice(32 * 8.0))
