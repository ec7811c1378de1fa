import math

import pytest
from helpers.made_up_estimates import make_estimate

from lightning_wn.batch_size.caveats import more_to_measure
from lightning_wn.batch_size.precision import decay_for, effective_size, measurements_for, relative_half_width
from lightning_wn.batch_size.run import ObservedRun
from lightning_wn.noise_scale.statistics import PairMoments


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_effective_size_is_that_of_the_moments(decay, count):
    moments = PairMoments()
    for _ in range(count):
        moments = moments.updated(1.0, 1.0, decay)
    assert effective_size(count, decay) == pytest.approx(moments.effective_size, rel=1e-9)


@pytest.mark.parametrize("decay", [1.0, 0.99])
def test_so_many_more_measurements_make_the_effective_size_that_is_needed(decay):
    more = measurements_for(0.2, 0.3, 60, decay)
    ratio = effective_size(60 + more, decay) / effective_size(60, decay)
    # rounded up to whole measurements
    assert 1.5**2 <= ratio < 1.5**2 * 1.02


def test_an_average_that_is_too_short_names_one_that_is_long_enough():
    assert math.isinf(measurements_for(0.2, 0.5, 1000, 0.9))
    decay = decay_for(0.2, 0.5, 1000, 0.9)
    assert effective_size(math.inf, decay) > effective_size(1000, 0.9) * 2.5**2


def test_narrow_and_open_intervals_need_no_number():
    assert measurements_for(0.2, 0.2, 50, 0.99) == 0
    assert math.isnan(measurements_for(0.2, math.inf, 50, 0.99))
    assert math.isinf(relative_half_width(100, 0, math.inf))
    assert more_to_measure(make_estimate(100.0), ObservedRun()) == ""
    assert more_to_measure(make_estimate(100.0, 50.0, math.inf), ObservedRun()) == ""
    # logs do not tell how the average was made
    assert more_to_measure(make_estimate(100.0, 50.0, 200.0), ObservedRun(ema_decay=math.nan)) == ""
