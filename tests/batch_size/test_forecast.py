import math
import random

import pytest

from lightning_wn.batch_size.forecast import LossPoint, bin_points, fit_forecast, score_forecast
from lightning_wn.batch_size.loss_points import loss_points


def make_points(count=12, *, scale=50.0, exponent=3.0, noise=0.1, seed=0, losses=(2.0, 0.8), claimed=None):
    """Noise scales on a power law, each off by a log-normal error that its interval tells."""
    rng = random.Random(seed)
    claimed = noise if claimed is None else claimed
    points = []
    for i in range(count):
        loss = losses[0] * (losses[1] / losses[0]) ** (i / (count - 1))
        value = scale / loss**exponent * math.exp(rng.gauss(0, noise))
        reach = math.exp(1.96 * claimed)
        points.append(LossPoint(loss=loss, noise_scale=value, lower=value / reach, upper=value * reach))
    return points


def test_finds_the_power_law():
    forecast = fit_forecast(make_points(noise=1e-4))
    # 12 points of relative error 1e-4 over a factor of 2.5 in loss
    assert forecast.exponent == pytest.approx(3.0, abs=1e-3)
    assert forecast.scale == pytest.approx(50.0, rel=1e-3)
    assert forecast.alpha == pytest.approx(1 / 3, abs=1e-3)
    assert forecast.at(0.4).noise_scale == pytest.approx(50 / 0.4**3, rel=2e-3)


@pytest.mark.parametrize("claimed", [0.2, 0.05])
def test_its_intervals_hold_what_comes(claimed):
    """As often as they say, also where the points' own intervals are too narrow by a factor of 4."""
    inside = slopes = 0
    runs = 400
    for seed in range(runs):
        points = make_points(13, noise=0.2, claimed=claimed, seed=seed, losses=(2.0, 0.6))
        forecast = fit_forecast(points[:12])
        ahead = forecast.at(points[12].loss)
        inside += ahead.lower <= points[12].noise_scale <= ahead.upper
        slopes += abs(forecast.exponent - 3.0) < 2.23 * forecast.exponent_error  # t, 10 degrees of freedom
    # three standard errors of a share of 0.95 of 400 are 0.033; intervals may be too wide, for errors never shrink
    assert inside / runs > 0.917
    assert slopes / runs > 0.917
    assert inside / runs < 1.0


def test_weights_follow_the_intervals():
    points = make_points(noise=1e-4)
    wild = LossPoint(loss=1.0, noise_scale=5000.0, lower=5.0, upper=5e6)
    assert fit_forecast([*points, wild]).exponent == pytest.approx(3.0, abs=0.01)


def test_too_few_points_are_said():
    with pytest.raises(ValueError, match="Too few points to forecast the noise scale: 4 with a finite interval"):
        fit_forecast(make_points(4))
    with pytest.raises(ValueError, match=r"The loss hardly changed, from 2 to 1.9"):
        fit_forecast(make_points(losses=(2.0, 1.9)))
    with pytest.raises(ValueError, match="positive loss and a finite positive interval"):
        fit_forecast([*make_points(), LossPoint(loss=1.0, noise_scale=5.0, lower=1.0, upper=math.inf)])
    with pytest.raises(ValueError, match="`loss` must be a positive number"):
        fit_forecast(make_points()).at(0.0)


def test_held_out_half_of_a_run_on_a_power_law():
    score = score_forecast(make_points(24, noise=0.1, seed=3))
    assert score.num_held_out == 12
    assert score.inside >= 0.75  # 12 points of one fit err together
    assert score.error_factor < score.constant_error_factor


def test_held_out_half_of_a_run_that_breaks_the_law():
    points = make_points(24, noise=0.01)
    bent = points[:12] + [
        LossPoint(loss=p.loss, noise_scale=points[11].noise_scale, lower=p.lower, upper=p.upper) for p in points[12:]
    ]
    score = score_forecast(bent)
    assert score.error_factor > score.constant_error_factor
    assert score.inside < 0.5


def test_the_share_that_is_fitted_is_checked():
    with pytest.raises(ValueError, match="`share` must lie between 0 and 1"):
        score_forecast(make_points(), share=1.0)
    with pytest.raises(ValueError, match="Too few points"):
        score_forecast(make_points(8))


def test_binning_averages_logarithms_over_the_run():
    points = make_points(1200, noise=0.3, claimed=0.3)
    bins = bin_points(points)
    assert len(bins) == 12
    assert bins[0].loss > bins[-1].loss
    exact = 50 / bins[0].loss ** 3
    assert bins[0].noise_scale == pytest.approx(exact, rel=3 * 0.3 / 10)  # 100 points of error 0.3
    assert bin_points(points[:12]) == points[:12]


def test_losses_belong_to_the_log_step_that_follows():
    history = {
        "step": [9, 19, 29, 39],
        "gns/noise_scale": [50.0, math.inf, 70.0, 80.0],
        "gns/noise_scale_lower": [40.0, 40.0, 60.0, 70.0],
        "gns/noise_scale_upper": [60.0, math.inf, 80.0, 90.0],
    }
    steps, losses = [4, 9, 14, 19, 24, 29], [4.0, 2.0, 9.0, 9.0, 1.0, math.nan]
    points = loss_points(history, steps, losses)
    # the second has no interval, the last no loss
    assert [(point.loss, point.noise_scale) for point in points] == [(3.0, 50.0), (1.0, 70.0)]
