import math
from functools import partial

import pytest

from lightning_wn.batch_size.learning_rate import learning_rate_factor
from lightning_wn.batch_size.tradeoff import (
    Factor,
    carry_interval,
    efficiency,
    examples_cost,
    examples_factor,
    steps_cost,
    steps_factor,
)


@pytest.mark.parametrize("batch_size", [1, 32, 1000])
def test_costs_lie_on_the_hyperbola_of_the_paper(batch_size):
    # arXiv 1812.06162, equation 2.11: (S/S_min - 1)(E/E_min - 1) = 1
    product = (steps_cost(batch_size, 100) - 1) * (examples_cost(batch_size, 100) - 1)
    assert product == pytest.approx(1)


def test_at_the_critical_batch_size_both_cost_twice_their_minimum():
    assert steps_cost(100, 100) == examples_cost(100, 100) == 2


@pytest.mark.parametrize(("old", "new"), [(32, 128), (128, 32), (7, 7)])
def test_factors_are_ratios_of_costs(old, new):
    assert steps_factor(old, new, 90) == pytest.approx(steps_cost(new, 90) / steps_cost(old, 90))
    assert examples_factor(old, new, 90) == pytest.approx(examples_cost(new, 90) / examples_cost(old, 90))
    # examples are steps times batch size
    assert examples_factor(old, new, 90) == pytest.approx(steps_factor(old, new, 90) * new / old)


@pytest.mark.parametrize(("critical", "expected"), [(0, 1.0), (1e12, 4.0), (math.inf, 4.0)])
def test_learning_rate_of_sgd_is_constant_far_above_and_proportional_far_below(critical, expected):
    assert learning_rate_factor("sgd", 32, 128, critical) == pytest.approx(expected)
    assert learning_rate_factor("adam", 32, 128, critical) == pytest.approx(math.sqrt(expected))


def test_limits_of_the_critical_batch_size():
    assert examples_cost(32, 0) == math.inf
    assert steps_cost(32, 0) == 1
    assert steps_cost(32, math.inf) == math.inf
    assert examples_cost(32, math.inf) == 1
    assert examples_factor(32, 8, 0) == 0.25
    assert steps_factor(32, 8, 0) == 1
    assert math.isnan(steps_factor(32, 8, math.nan))


@pytest.mark.parametrize(
    "rule",
    [steps_factor, examples_factor, partial(learning_rate_factor, "sgd"), partial(learning_rate_factor, "adam")],
    ids=["steps", "examples", "sgd", "adam"],
)
@pytest.mark.parametrize(("old", "new"), [(32, 128), (128, 32)])
def test_no_noise_scale_in_the_interval_gives_a_factor_outside(rule, old, new):
    factor = carry_interval(lambda critical: rule(old, new, critical), 90, 20, 400)
    inside = [rule(old, new, critical) for critical in range(20, 401)]
    assert (factor.lower, factor.upper) == (min(inside), max(inside))
    assert factor.lower < factor.value < factor.upper


def test_open_intervals_carry_through():
    factor = carry_interval(lambda critical: efficiency(32, critical), 96, 0, math.inf)
    assert factor == Factor(0.75, 0.0, 1.0)
