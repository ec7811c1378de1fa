import math
import random
from dataclasses import replace

import pytest

from lightning_wn.batch_size.forecast import LossPoint, fit_forecast, score_forecast
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
    with pytest.raises(ValueError, match="Too few points to forecast the noise scale: 4 where "):
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


def test_a_run_that_went_its_own_way_is_not_continued_on_the_law():
    """It grew with the first half of the fall and has stayed since; the other has kept to the law."""
    points = make_points(12, noise=0.02)
    flat = [replace(points[5], loss=point.loss) for point in points[6:]]
    forecast, on_law = fit_forecast([*points[:6], *flat]), fit_forecast(points)
    assert forecast.weight < 0.2
    assert on_law.weight > 0.9
    ahead = forecast.at(0.5)
    assert ahead.noise_scale < 1.35 * forecast.last
    assert ahead.lower < forecast.last < ahead.upper


def test_a_constant_noise_scale_stays_what_it_is():
    points = [LossPoint(loss=1 / i, noise_scale=80.0, lower=70.0, upper=90.0) for i in range(1, 8)]
    forecast = fit_forecast(points)
    assert forecast.at(0.01).noise_scale == pytest.approx(80.0)
    assert forecast.exponent == pytest.approx(0.0)


def make_history(grad_sq_norm, cov_trace, lower):
    names = ("grad_sq_norm", "cov_trace", "noise_scale_lower")
    columns = zip(names, (grad_sq_norm, cov_trace, lower), strict=True)
    steps = range(9, 10 * len(lower), 10)
    return {"step": list(steps)} | {f"gns/{name}": list(column) for name, column in columns}


def test_stretches_divide_means_and_leave_no_estimate_out():
    """Estimates of noisy |G|², of which many are negative: those with a closed interval alone would read too low."""
    rng = random.Random(0)
    count, truth = 1200, 100.0
    grad_sq_norm = [rng.gauss(1.0, 1.0) for _ in range(count)]
    cov_trace = [rng.gauss(truth, 1.0) for _ in range(count)]
    lower = [max(t / (x + 2.0), 0.0) if x + 2.0 > 0 else math.inf for x, t in zip(grad_sq_norm, cov_trace, strict=True)]
    history = make_history(grad_sq_norm, cov_trace, lower)
    losses = [2.0 - i / count for i in range(count)]
    points = loss_points(history, history["step"], losses)
    assert len(points) == 12
    assert points[0].loss > points[-1].loss
    for point in points:
        # 100 values of a relative error of 1 each, three standard errors
        assert point.noise_scale == pytest.approx(truth, rel=0.35)
    assert sum(p.noise_scale for p in points) / 12 == pytest.approx(truth, rel=3 * 0.1 / 12**0.5 + 0.01)


def test_a_stretch_that_is_lost_in_noise_is_no_point():
    history = make_history([0.1, 0.1, -0.3, 0.1], [5.0] * 4, [40.0, 40.0, 0.0, 40.0])
    points = loss_points(history, history["step"], [4.0, 3.0, 2.0, 1.0])
    assert [(p.loss, round(p.noise_scale)) for p in points] == [(4.0, 50), (3.0, 50), (1.0, 50)]
    assert points[0].lower == pytest.approx(40.0)
    assert points[0].upper == pytest.approx(50 * 50 / 40)
    assert loss_points(history, [], []) == []


def test_losses_belong_to_the_log_step_that_follows():
    history = make_history([0.1, 0.1, 0.1, 0.1], [5.0, 6.0, 7.0, 8.0], [40.0] * 4)
    steps, losses = [4, 9, 14, 19, 24, 29], [4.0, 2.0, 9.0, 9.0, 1.0, math.nan]
    points = loss_points(history, steps, losses)
    # the last has no loss
    assert [(point.loss, round(point.noise_scale)) for point in points] == [(3.0, 50), (9.0, 60), (1.0, 70)]
