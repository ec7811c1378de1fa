"""From an interval to the next accumulation factor, without Lightning."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_wn.batch_size.tradeoff import examples_cost
from lightning_wn.callbacks.adaptive_batch_size.rule import AccumulationRule
from lightning_wn.callbacks.adaptive_batch_size.schedule import AccumulationSchedule
from lightning_wn.callbacks.scheduler_clock import SchedulerClock

noise_scales = st.floats(0.0, 1e9, allow_nan=False)
factors = st.integers(1, 300)


def test_goes_by_the_lower_end_upwards_and_by_the_upper_end_downwards():
    rule = AccumulationRule(target=1.0, growth=100.0, allow_decrease=True)
    assert rule.next_factor(8, micro_batch=10.0, lower=320.0, upper=1e9) == 32
    assert rule.next_factor(8, micro_batch=10.0, lower=0.0, upper=40.0) == 4
    assert rule.next_factor(8, micro_batch=10.0, lower=40.0, upper=320.0) == 8


@pytest.mark.parametrize(("lower", "upper"), [(0.0, math.inf), (math.nan, math.nan)])
def test_before_there_is_an_interval_nothing_changes(lower, upper):
    rule = AccumulationRule(target=1.0, allow_decrease=True)
    assert rule.next_factor(8, micro_batch=10.0, lower=lower, upper=upper) == 8
    assert rule.next_factor(8, micro_batch=math.nan, lower=1e6, upper=1e6) == 8


def test_a_gradient_lost_in_noise_still_raises():
    """An infinite noise scale has a finite lower end, and even an infinite one is bounded by the growth."""
    rule = AccumulationRule(target=0.1)
    assert rule.next_factor(4, micro_batch=10.0, lower=1e4, upper=math.inf) == 8
    assert rule.next_factor(4, micro_batch=10.0, lower=math.inf, upper=math.inf) == 8


def test_growth_bounds_one_change_but_never_stops_the_smallest():
    assert AccumulationRule(target=1.0, growth=1.2).next_factor(1, micro_batch=1.0, lower=99.0, upper=99.0) == 2
    assert AccumulationRule(target=1.0, growth=3.0).next_factor(4, micro_batch=1.0, lower=99.0, upper=99.0) == 12


def test_hysteresis():
    rule = AccumulationRule(target=1.0, hysteresis=0.5, allow_decrease=True)
    assert [rule.next_factor(10, micro_batch=1.0, lower=n, upper=n) for n in (14.9, 15.0, 6.7, 6.6)] == [10, 15, 10, 8]


def test_takes_a_factor_whose_windows_line_up_soon():
    """From 64, 96 lines up every 192 batches and 97 every 6,208."""
    rule = AccumulationRule(target=1.0)
    assert rule.next_factor(64, micro_batch=1.0, lower=97.0, upper=97.0) == 96


@given(noise_scales, st.floats(1.0, 10.0), factors, st.floats(0.5, 100.0), st.floats(0.01, 2.0), st.floats(1.01, 8.0))
@settings(max_examples=300, deadline=None)
def test_never_costs_more_examples_than_the_target_says(lower, width, present, micro_batch, target, growth):
    """Whatever the noise scale within its interval: a raised batch size costs at most 1 + target."""
    rule = AccumulationRule(target=target, growth=growth, max_accumulate=200)
    new = rule.next_factor(present, micro_batch=micro_batch, lower=lower, upper=lower * width, most=150)
    assert new >= present
    if new > present:
        # up to rounding of the floats
        assert examples_cost(new * micro_batch, lower) <= (1.0 + target) * (1 + 1e-12)
        assert new <= min(150, max(present + 1, present * growth))


@given(noise_scales, st.floats(1.0, 10.0), factors, st.floats(0.5, 100.0), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_shrinks_only_where_the_whole_interval_asks_for_it(lower, width, present, micro_batch, least):
    upper = lower * width
    rule = AccumulationRule(target=0.5, allow_decrease=True, min_accumulate=least)
    new = rule.next_factor(present, micro_batch=micro_batch, lower=lower, upper=upper)
    if new < present:
        assert present * micro_batch > 0.5 * upper
        assert new >= least
        assert new * micro_batch >= 0.5 * upper * (1 - 1e-12)
        assert new >= present / 2


@given(noise_scales, factors)
@settings(max_examples=200, deadline=None)
def test_comes_to_rest(noise_scale, present):
    rule = AccumulationRule(target=1.0, allow_decrease=True)
    for _ in range(200):
        last = present
        present = rule.next_factor(present, micro_batch=1.0, lower=noise_scale, upper=noise_scale, most=400)
    assert present == last
    if 10.0 <= noise_scale <= 400.0:
        # short of the wish by 20 % for alignment and 10 % of hysteresis at most, and by rounding to whole factors
        assert noise_scale / 1.4 < present < noise_scale * 1.4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": 0.0}, "`target` must be a positive fraction of the noise scale, got 0.0"),
        ({"target": math.nan}, "`target` must be a positive fraction"),
        ({"min_accumulate": 0}, "`min_accumulate` must be a positive whole number of micro-batches, got 0"),
        ({"min_accumulate": 4, "max_accumulate": 2}, "not below `min_accumulate=4`, or None for no bound, got 2"),
        ({"max_accumulate": 2.5}, "`max_accumulate` must be a whole number of micro-batches"),
        ({"growth": 1.0}, "`growth` must be a finite factor above 1, got 1.0"),
        ({"hysteresis": -0.1}, "`hysteresis` must be a share of the batch size, 0 or more, got -0.1"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        AccumulationRule(**arguments)


@pytest.mark.parametrize("factors", [{}, {-1: 2}, {0: 0}, {0: 1.5}, {1.5: 2}, {True: 2}])
def test_bad_schedules(factors):
    with pytest.raises(ValueError, match=r"`schedule` must map positions.*write for instance"):
        AccumulationSchedule(factors, "step")


def test_schedule_in_any_order():
    schedule = AccumulationSchedule({10: 4, 0: 1, 5: 2}, "epoch")
    assert [schedule.factor_at(position, 7) for position in (0, 4, 5, 9, 10, 99)] == [1, 1, 2, 2, 4, 4]


@given(st.integers(1, 5), st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_schedulers_step_as_often_as_with_the_first_factor(first, multiples, batches, epochs):
    """Against a loop that trains with the first factor, wherever both have just ended a window of the epoch."""
    clock, made, base = SchedulerClock(first), 0, 0
    for epoch in range(epochs):
        clock.start_epoch()
        factor = first * multiples[epoch % len(multiples)]
        for batch in range(1, batches + 1):
            base += batch % first == 0 or batch == batches
            if batch % factor == 0 or batch == batches:
                made += 1 + clock.owed(batch, is_last=batch == batches)
                assert made == base
