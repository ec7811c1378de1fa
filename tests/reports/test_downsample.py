import math
import random

import pytest

from lightning_wn.reports.downsample import downsample
from lightning_wn.reports.logged_history import LoggedHistory


def make_history(count):
    rng = random.Random(0)
    return {"step": [float(i) for i in range(count)], "a": [rng.gauss(0, 1) for _ in range(count)],
            "b": [rng.gauss(0, 1) for _ in range(count)]}  # fmt: skip


def test_keeps_ends_and_extremes():
    history = make_history(100_000)
    history["a"][12_345] = 99.0
    history["b"][77_777] = -99.0
    history["b"][50_000] = math.inf
    short = downsample(history, 1000)
    assert 300 < len(short["step"]) <= 1000
    assert (short["step"][0], short["step"][-1]) == (0, 99_999)
    assert short["a"][short["step"].index(12_345)] == 99
    assert short["b"][short["step"].index(77_777)] == -99
    assert math.inf in short["b"]
    for key in ("a", "b"):
        assert (min(short[key]), max(short[key])) == (min(history[key]), max(history[key]))
    assert short["step"] == sorted(short["step"])
    # rows stay whole
    assert all(short["a"][i] == history["a"][int(step)] for i, step in enumerate(short["step"]))


def test_short_series_stay_as_they_are():
    history = make_history(1000)
    assert downsample(history, 1000) == history


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="`max_points` must be at least 8 for 3 series, got 7"):
        downsample(make_history(100), 7)


def test_a_callbacks_own_history_stays_small():
    history = LoggedHistory()
    for step in range(10_000):
        history.append(step, {"gns/noise_scale": 500.0 if step == 1234 else float(step % 7)})
    assert len(history.series["step"]) <= 2001
    assert max(history.series["gns/noise_scale"]) == 500
    assert (history.series["step"][0], history.series["step"][-1]) == (0, 9999)


def test_a_callbacks_own_history_survives_a_checkpoint():
    history, other = LoggedHistory(), LoggedHistory()
    history.append(4, {"gns/noise_scale": 3.0})
    other.load_state_dict(history.state_dict())
    other.append(9, {"gns/noise_scale": 4.0})
    assert other.series == {"step": [4.0, 9.0], "gns/noise_scale": [3.0, 4.0]}
    assert history.series["step"] == [4.0]
